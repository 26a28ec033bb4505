"""The imports of the fork server of `tests.spawn`, so that ranks start at once."""

import warnings

warnings.simplefilter("ignore")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401 - DeepSpeed imports torch's compiler with it: 3 s
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - any torch optimizer imports it: 2 s
import transformers.modeling_utils  # noqa: E402, F401 - family "auto": 3 s

import trainer.loop  # noqa: E402, F401

torch.set_num_threads(1)
