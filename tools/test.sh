#!/usr/bin/env bash
# Make an environment and run the whole suite: format, lint, types, tests. Arguments go to pytest, as in:
#   bash tools/test.sh tests/unit/test_learning_rate.py -k cosine
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

# The report is looked at in a real browser, and jobs run in a real SLURM; where these cannot be installed their tests skip and
# say so. RUNLEVEL=1 keeps Debian from starting SLURM's daemons of its own.
install() {
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@") \
        >/dev/null 2>&1
}
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    command -v chromium >/dev/null || install chromium ||
        echo "chromium could not be installed: the browser tests will skip"
    command -v strace >/dev/null || install strace ||
        echo "strace could not be installed: the tests that kill a run at a system call will skip"
    command -v slurmctld >/dev/null || install slurmctld slurmd slurm-client munge ||
        echo "slurm could not be installed: the SLURM tests will skip"
fi
environment "[dev]"
export DS_ACCELERATOR=${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}

ruff format --check --quiet .
ruff check --quiet .
mypy
# Two workers, as tests/conftest.py divides the tests.
[ $# -gt 0 ] || set -- --numprocesses 2
exec python -m pytest "$@"
