"""The former name of trainer.cluster.requeue, which scripts of jobs that are already in a queue
still call."""

import sys

from trainer.cluster.requeue import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
