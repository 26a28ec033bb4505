"""A run and its plan: what does not fit is refused, exhausted memory is one line, and both figures are recorded."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.runs import write_recipe
from tools.campaign.ranks import run_ranks, train
from trainer.run.memory_check import host_bytes
from trainer.track import read_metrics

MIB = 2**20
# 64 rows of 512 tokens: their activations are some hundred MiB.
LARGE = {"batch__global_sequences": 128, "batch__micro_sequences": 64, "data__seq_len": 512}
LONG = {"model.config.max_position_embeddings": 512}


def limited(left: int, arguments: Sequence[str]) -> int:
    """`train` in a process that may take so many more bytes."""
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    most = int(held.split()[1]) * 1024 + left
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return train(arguments)


def settings(**keys: object) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize(("first", "when"), [("true", "the worst case, before step 1"), ("false", "step 1")])
def test_exhausted_memory_names_what_fills_it_and_what_frees_it(first: str, when: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **LARGE)
    command = [str(recipe), *settings(**LONG, **{"train.worst_case_first": first})]
    ended = run_ranks(limited, 400 * MIB, command, world_size=1, log=tmp_path / "log")
    assert ended.codes == (78,), ended.said
    (line,) = [line for line in ended.said.splitlines() if "error" in line]
    assert f"rank 0: forward of {when}: out of memory: " in line
    assert "by the plan a rank now holds " in line
    assert "activations: " in line
    assert "batch.micro_sequences=32 frees " in line
    assert "train.recompute=full frees " in line


def test_what_does_not_fit_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """The plan needs more than this machine has, though the weights alone would fit."""
    recipe = write_recipe(tmp_path, **LARGE)
    sequences = 2 * host_bytes() // (512 * 2 * 48 * 4 * 10)  # ten times the features are kept of each layer, and more
    keys = {"batch.micro_sequences": sequences, "batch.global_sequences": sequences}
    ended = run_ranks(train, [str(recipe), *settings(**keys, **LONG)], world_size=1, log=tmp_path / "log")
    assert ended.codes == (78,), ended.said
    assert "by the plan " in ended.said
    assert "and this machine has" in ended.said


def test_a_run_records_its_plan_beside_what_was_measured(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=3, zero__stage=1)
    ended = run_ranks(train, [str(recipe)], world_size=2, log=tmp_path / "log")
    assert ended.codes == (0, 0), ended.said
    assert "plan: " in ended.said
    assert " ± 8% on a rank" in ended.said
    summary = json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())
    predicted, measured = summary["plan"]["predicted"], summary["plan"]["measured"]
    # Nearly all of so small a run is what its processes take, which are forked here.
    assert 0.3 < measured["memory_bytes"] / predicted["memory_bytes"] < 3.0
    assert measured["memory_bytes"] / 2**30 == pytest.approx(summary["memory_gib"], rel=0.2)
    records = read_metrics(tmp_path / "runs" / "small" / "metrics.jsonl")
    assert measured["step_time_s"] == sorted(float(record["step_time_s"] or 0.0) for record in records)[1]
    assert predicted["step_time_s"] is None  # nothing was measured of this machine
    assert ended.said.count(", measured ") == 1


def test_a_copy_for_a_save_that_has_no_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    ended = run_ranks(
        without_room, [str(recipe), *settings(**{"checkpoint.async": "true"})], world_size=1, log=tmp_path / "log"
    )
    assert ended.codes == (78,), ended.said
    (line,) = [line for line in ended.said.splitlines() if "error" in line]
    assert "a save copies" in line
    assert "set checkpoint.async to false" in line


def without_room(arguments: Sequence[str]) -> int:
    """`train` on a machine that has no memory to spare."""
    import trainer.run.worst_case

    trainer.run.worst_case.available_bytes = lambda: 1000
    return train(arguments)


def of_rank_1(left: int, arguments: Sequence[str]) -> int:
    """`train` on ranks of which one may take less than the other."""
    return limited(left, arguments) if os.environ["RANK"] == "1" else train(arguments)


def test_the_largest_micro_batch_is_found_once_and_by_all_ranks(tmp_path: Path) -> None:
    """One rank has less memory than the plan knows of; the trials on it decide."""
    recipe = write_recipe(tmp_path, data__seq_len=512, train__steps=1, train__eval_sequences=2, checkpoint__every=1)
    automatic = {"batch.micro_sequences": "null", "train.auto_micro_batch": "true", "batch.global_sequences": 64}
    # Micro-batches of 8 need 550 MiB, of 16 850: how much a rank and its trial hold before differs by less.
    command = [str(recipe), *settings(**LONG, **{"model.config.intermediate_size": 2048}, **automatic)]
    first = run_ranks(of_rank_1, 650 * MIB, command, world_size=2, log=tmp_path / "log")
    assert first.codes == (0, 0), first.said
    run = tmp_path / "runs" / "small"
    kept = json.loads((run / "micro-batch.json").read_text())
    size, tried = kept["micro_sequences"], dict(kept["tried"])
    assert tried[2 * size] is False
    assert tried[32] is False  # which the plan says may fit
    assert tried[size] is True
    assert f"step: 64 sequences = micro {size} × data-parallel 2 × {32 // size} micro-batches" in first.said
    entry = json.loads((run / "resolved.json").read_text())["values"]["batch.micro_sequences"]
    assert entry == {"value": size, "origin": "tried on the devices"}
    again = run_ranks(train, [*command, "--set", "train.steps=2"], world_size=2, log=tmp_path / "log")
    assert again.codes == (0, 0), again.said
    assert f"batch.micro_sequences {size}: found by an earlier start of this run" in again.said
