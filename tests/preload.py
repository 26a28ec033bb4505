"""Imported once by the fork server of `tests.spawn`, so that ranks start at once."""

import warnings

warnings.simplefilter("ignore")

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402

torch.set_num_threads(1)
