"""Run trainer.cluster.requeue under its former name: scripts of jobs that are already in a queue call this one."""

import sys

from trainer.cluster.requeue import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
