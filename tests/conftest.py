"""Settings of the whole suite."""

from hypothesis import settings

# Examples are the same in every run, and no test depends on how fast the machine is.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
