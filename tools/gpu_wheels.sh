#!/usr/bin/env bash
# Collects the wheels that tools/bench_gpu.py needs on a machine that has torch and transformers but
# no network:
#
#     bash tools/gpu_wheels.sh DIR
#
# Without torch, transformers and what these bring, and without what only data sets and W&B need, it
# is a few MB. DeepSpeed is built here, without its compiled operations.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?give the folder to write to: bash tools/gpu_wheels.sh DIR}
. tools/environment.sh
environment "[dev]"
packages=(
    annotated-types einops hjson hypothesis iniconfig jinja2 markdown-it-py markupsafe mdurl msgpack ninja packaging pluggy psutil
    py-cpuinfo pydantic pydantic-core pygments pytest pytest-timeout rich sortedcontainers typing-extensions typing-inspection
)
mkdir -p "$folder"
python -m pip download --quiet --no-deps --only-binary :all: --constraint tools/constraints.txt --dest "$folder" "${packages[@]}"
DS_BUILD_OPS=0 python -m pip wheel --quiet --no-deps --no-build-isolation --constraint tools/constraints.txt \
    --wheel-dir "$folder" deepspeed
du --summarize --human-readable "$folder"
