"""The imports of the fork server of `tests.spawn`, so that ranks start at once."""

import gc
import warnings

warnings.simplefilter("ignore")

import pytest  # noqa: E402, F401 - every body comes from a file of tests
import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: E402, F401 - family "auto": 3 s
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import tests.parallel.training  # noqa: E402, F401 - which most bodies use
import tools.campaign.preload  # noqa: E402, F401 - what a run imports

get_checkpoint_conversion_mapping("gpt_neox")  # makes those of all models, from 900 patterns: 0.3 s
gc.collect()
gc.freeze()
