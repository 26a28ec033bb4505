"""Recipes drawn at random from the schema: each that `check` accepts must start.

    python -m tools.campaign.recipes --cases 300 --seed 0

Each is started for its one or two steps. A case passes if every rank ends with 0; with 93 if what
it was told to compute is not finite; or with a line for what `check` cannot know
(UNKNOWN_TO_CHECK). A traceback, and a rank that is killed, waits or is left behind, is a fault. All
that a case writes is in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.campaign.cases import report
from tools.campaign.ranks import Ended, run_ranks, train
from tools.campaign.recipe_draw import Drawn, draw
from tools.campaign.recipe_supplies import Supplies
from trainer.cli import main as main_of_trainer
from trainer.errors import EXIT_DATA, EXIT_NO_PROGRESS, EXIT_OK, EXIT_RECIPE

TIME_LIMIT_S = 60.0
REPORTED_EVERY = 10  # cases draw their report, which takes longer than their steps
# Faults that only the data, the tokenizer or the device shows.
UNKNOWN_TO_CHECK: Sequence[str] = (
    r"holds nothing to learn",  # seq_len is shorter than the text before an answer
    # The step's rows hold no target: a row of one token, an answer that is cut off.
    r"has no target: every label",
    r"no field '",  # in a file that was given names for another kind of rows
    r"no (pair|conversation|label|'[^']*'): it has ",
    r"no '[^']*'",
    r"the sources are too small for bpe:",
)
TELLING = re.compile(r"triaxis: error: |[A-Za-z_.]*(Error|Exception)\b|  File \".*(trainer|parallel|deepspeed)/.*line \d+")
SAYS = re.compile(r"^triaxis: error: (.*)$", re.MULTILINE)


def train_in(folder: str, recipe: str, with_report: bool) -> int:
    """Run `train` on this rank, in a folder of the case's own, to which the recipe's paths are
    relative."""
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    return main_of_trainer(["train", recipe]) if with_report else train([recipe])


def start(drawn: Drawn, folder: Path, *, with_report: bool = False) -> Ended:
    """Run the recipe's steps on all ranks."""
    folder.mkdir(parents=True)
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(drawn.recipe))
    log = folder / "log"
    arguments = (str(folder), str(recipe), with_report)
    return run_ranks(train_in, *arguments, world_size=drawn.world_size, log=log, timeout_s=TIME_LIMIT_S)


def fault(ended: Ended) -> str:
    """Return what is wrong with the end of a run; "" if nothing is."""
    codes = set(ended.codes)
    if codes == {EXIT_OK} or codes == {EXIT_NO_PROGRESS}:
        return ""
    said = SAYS.findall(ended.said)
    known = all(any(re.search(pattern, line) for pattern in UNKNOWN_TO_CHECK) for line in said)
    if len(codes) == 1 and codes <= {EXIT_DATA, EXIT_RECIPE} and said and known:
        return ""
    return f"ended with {ended.codes}: {_essence(ended.said)}"


def _essence(said: str) -> str:
    """Return our lines and the last lines of tracebacks, each once; if there are none, the end of
    the output."""
    telling = [line[:400] for line in said.splitlines() if TELLING.match(line)]
    return "\n".join(dict.fromkeys(telling)) or said[-1500:]


def one_case(seed: int, number: int, supplies: Supplies, folder: Path) -> dict[str, Any]:
    """Draw and start one recipe, and return what came of it."""
    drawn = draw(seed, number, supplies)
    try:
        ended = start(drawn, folder, with_report=number % REPORTED_EVERY == 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = fault(ended)
    return {
        "case": number,
        "passed": not wrong,
        "asked": drawn.asked,
        "accepted": drawn.accepted,
        "world_size": drawn.world_size,
        "codes": ended.codes,
        "wall_s": round(ended.wall_s, 1),
        "said": SAYS.findall(ended.said)[:3],
        **({"seed": seed, "fault": wrong, "recipe": drawn.recipe} if wrong else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="triaxis-recipes-") as scratch:
        supplies = Supplies(Path(scratch) / "supplies")
        for number in options.only or range(options.cases):
            outcome = one_case(options.seed, number, supplies, Path(scratch) / str(number))
            report(campaign="recipes", **outcome)
            totals.update(asked=outcome["asked"], accepted=outcome["accepted"], started=1, passed=outcome["passed"])
            totals[f"ended {'/'.join(map(str, sorted(set(outcome['codes']))))}"] += 1
    report(campaign="recipes", seed=options.seed, **totals)
    return int(totals["passed"] < totals["started"])


if __name__ == "__main__":
    raise SystemExit(main())
