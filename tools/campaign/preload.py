"""Imported once by the fork server of `ranks`."""

import logging
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.simplefilter("ignore")
logging.getLogger().setLevel(logging.WARNING)

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401 - DeepSpeed imports torch's compiler with it: 3 s
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - any torch optimizer imports it: 2 s

import trainer.loop  # noqa: E402, F401

torch.set_num_threads(1)
