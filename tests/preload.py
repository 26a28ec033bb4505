"""Imported once by the fork server of `tests.spawn`, so that ranks start at once."""

import gc
import warnings

warnings.simplefilter("ignore")

import pytest  # noqa: E402, F401 - every body comes from a file of tests
import transformers.modeling_utils  # noqa: E402, F401 - family "auto": 3 s

import tests.parallel.training  # noqa: E402, F401 - which most bodies use
import tools.campaign.preload  # noqa: E402, F401 - what a run imports

gc.collect()
gc.freeze()
