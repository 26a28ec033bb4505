#!/usr/bin/env bash
# Make an environment and run the whole suite: format, lint, types, tests. Arguments go to pytest, as in:
#   bash tools/test.sh tests/unit/test_schedule.py -k cosine
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

# The report is looked at in a real browser; where none can be installed those tests skip and say so.
if ! command -v chromium >/dev/null && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) \
        >/dev/null 2>&1 || echo "chromium could not be installed: the browser tests will skip"
fi
environment "[dev]"
export DS_ACCELERATOR=${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}

ruff format --check --quiet .
ruff check --quiet .
mypy
exec python -m pytest "$@"
