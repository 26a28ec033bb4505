"""`python -m trainer` is `triaxis`."""

import sys

from trainer.cli import main

sys.exit(main())
