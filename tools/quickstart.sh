#!/usr/bin/env bash
# Make an environment, install Triaxis, and train a small Llama on the sources of Python's standard library with the deepspeed
# launcher, two ranks, ZeRO-1, fp32. It ends with the share of its samples that are Python. Arguments go to `train`, as in:
#   bash tools/quickstart.sh --set train.steps=500
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
environment ""

name=quickstart
for ((n = 2; ; n++)); do
    [ -e "runs/$name" ] || break
    name=quickstart-$n
done
ranks=(--num_accelerators 2)
if command -v nvidia-smi >/dev/null && [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -gt 0 ]; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
    ranks=(--num_gpus "$((gpus > 2 ? 2 : gpus))")
else
    export DS_ACCELERATOR=cpu # else DeepSpeed says twice that it found no GPU
fi
status=0
deepspeed "${ranks[@]}" --log_level error --no_local_rank --module trainer \
    train ds_configs/quickstart.json --set run.name="$name" "$@" || status=$?
[ "$status" -eq 0 ] || exit "$status"
echo
PYTHONPATH=. python tools/python_samples.py "runs/$name/export"
echo
echo "Report:  runs/$name/report.html"
echo "Sample:  .venv/bin/triaxis generate runs/$name --prompt 'import '"
