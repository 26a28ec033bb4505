"""The entry point of `python -m trainer`, which is `triaxis`."""

import sys

from trainer.cli import main

sys.exit(main())
