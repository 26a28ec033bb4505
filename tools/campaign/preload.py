"""The imports of the fork server of `ranks`, all that a run imports on its way: each rank would
take seconds for them."""

import encodings.idna  # noqa: F401 - any look-up of a host
import gc
import logging
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.simplefilter("ignore")
logging.getLogger().setLevel(logging.WARNING)

import deepspeed.module_inject.auto_ep_layer  # noqa: E402 - DeepSpeed imports it, for mori and setuptools
import deepspeed.ops.op_builder.all_ops  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402 - it imports torch's compiler: 3 s
import numpy.ctypeslib  # noqa: E402
import numpy.ma  # noqa: E402, F401 - numpy.unique
import rich._emoji_codes  # noqa: E402, F401
import setuptools  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - any torch optimizer imports it: 2 s

import trainer.cli  # noqa: E402
import trainer.loop  # noqa: E402
import trainer.track.console  # noqa: E402, F401

torch.set_num_threads(1)
if os.environ["DS_ACCELERATOR"] == "cpu":
    # DeepSpeed runs a compiler to find out which of its extensions could be built, 0.16 s in each
    # rank. On a GPU it would also open the device, which a fork server must not do.
    _ = deepspeed.ops.__compatible_ops__
gc.collect()
# Otherwise each of DeepSpeed's calls of gc.collect scans all of this again: 0.3 s in each rank.
gc.freeze()
