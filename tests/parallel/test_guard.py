"""The guard in real runs: poisoned steps are skipped and explained, wrong replicas found, decisions kept over a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.campaign import nan_injection
from tools.campaign.cases import WAYS, Way, arguments, digests, numbers, remembered, write_recipe
from tools.campaign.ranks import run_ranks, train
from tools.campaign.spikes import plant_spikes
from trainer.cli import main
from trainer.errors import EXIT_DATA, EXIT_NO_PROGRESS
from trainer.track import read_metrics

BY_NAME = {way.name: way for way in WAYS} | {
    "dp4": Way("dp4", 4),
    "dp2xtp2": Way("dp2xtp2", 4, ("parallel.tensor=2",)),
    "zbv": Way("zbv", 2, ("parallel.pipeline=2", "parallel.schedule=zbv", "parallel.virtual_stages=2")),
    "cpu-zero2": Way("cpu-zero2", 2, ("zero.stage=2", "zero.offload_optimizer.device=cpu")),
    "full": Way("full", 2, ("parallel.tensor=2", "train.recompute=full")),
}
# The first one's draw has a tied weight's gradient, of the last micro-batch, on one of the stages that hold it.
EVERY_DAY = {("tp2xpp2", "bf16")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in EVERY_DAY else [pytest.mark.grid])
        for name in BY_NAME
        if name != "dp4"
        for dtype in ("fp32", "bf16", "fp16")
    ],
)
def test_a_poisoned_step_is_skipped_everywhere_and_its_culprit_named(name: str, dtype: str, tmp_path: Path) -> None:
    """Loss, one gradient element or one output, on one rank; weights and moments keep every bit, also through the replay."""
    count, failures = nan_injection.run(BY_NAME[name], dtype, steps=12, count=9, seed=7, folder=tmp_path)
    assert count == 9
    assert failures == {}


@pytest.mark.grid
@pytest.mark.parametrize("name", ["one", "dp2-zero3"])
def test_the_culprit_is_named_in_any_model_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nan_injection, "KINDS", ("gradient",))
    config = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"intermediate_size": 48, "max_position_embeddings": 64}
    model = {"family": "auto", "config": {**config, **sizes}}
    count, failures = nan_injection.run(BY_NAME[name], "fp32", steps=8, count=6, seed=3, folder=tmp_path, model=model)
    assert (count, failures) == (6, {})


def change_weight(name: str, rank: int, step: int, value: float | None, command: Sequence[str], blind: bool = False) -> int:
    """`train`, in which element 5 of what one rank holds of a weight changes after a step: to `value`, or by its last bit.
    `blind`: a mistake, saving does not look whether values are finite."""
    import trainer.checkpoint.save
    import trainer.guard.guard

    if blind:
        trainer.checkpoint.save.is_finite = lambda values: True
    judge = trainer.guard.guard.Guard.judge

    def judged(guard: Any, now: int, *rest: Any) -> None:
        engine = guard._inspector._engine
        if now == step and engine.mesh.rank == rank:
            parameter = next(p for p, spec in engine.specs if spec.pieces[0].name == name)
            held = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
            if value is None:
                held.view({2: torch.int16, 4: torch.int32}[held.element_size()])[5] ^= 1
            else:
                held[5] = value
        judge(guard, now, *rest)

    trainer.guard.guard.Guard.judge = judged  # type: ignore[method-assign]
    return train(command)


FLIPS = [
    # (layout, format, weight, rank, what must be said)
    ("dp4", "fp32", "transformer.h.2.mlp.c_fc.weight", 2, "rank 2 differs from 0, 1, 3"),
    ("dp2-zero2", "bf16", "transformer.h.0.ln_1.weight", 1, "ranks 0, 1 differ"),
    ("pp2", "fp32", "transformer.wte.weight", 1, "ranks 0, 1 differ"),  # the ends' copies of the tied weight
    ("tp2", "fp32", "transformer.h.3.ln_2.bias", 0, "ranks 0, 1 differ"),  # copies over tensor ranks
    ("dp2-zero1", "fp16", "transformer.h.3.attn.c_proj.weight", 0, "ranks 0, 1 differ"),
    ("tp2xpp2", "fp32", "transformer.h.1.ln_2.bias", 1, "ranks 0, 1 differ"),
    ("dp2xtp2", "fp32", "transformer.h.1.mlp.c_fc.weight", 3, "ranks 1, 3 differ"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "weight", "rank", "said"),
    [pytest.param(*flip, marks=[pytest.mark.grid] if place > 0 else []) for place, flip in enumerate(FLIPS)],
)
def test_one_flipped_bit_on_one_replica_ends_the_run_and_is_named(
    name: str, dtype: str, weight: str, rank: int, said: str, tmp_path: Path
) -> None:
    way = BY_NAME[name]
    recipe = write_recipe(tmp_path, steps=8, every=0, keep=1, precision={"dtype": dtype}, guard={"check_every": 2})
    body = partial(change_weight, weight, rank, 5, None)
    ended = run_ranks(body, arguments(recipe, tmp_path / "run", way), world_size=way.processes, log=tmp_path / "log")
    assert ended.codes == (EXIT_DATA,) * way.processes, ended.said
    line = f"after step 6: weight {weight} is not the same: {said}; last compared equal after step 4"
    assert line in ended.said
    assert ended.said.count("triaxis: error:") == 1


@pytest.mark.parametrize("name", ["dp2-zero3", *(pytest.param(name, marks=pytest.mark.grid) for name in ("one", "dp2-zero0"))])
def test_a_weight_that_is_nan_ends_the_run_with_code_93(name: str, tmp_path: Path) -> None:
    way, weight = BY_NAME[name], "transformer.h.2.mlp.c_fc.weight"
    recipe = write_recipe(tmp_path, steps=9, every=0, keep=1, guard={"max_skipped": 3, "check_every": 0})
    body = partial(change_weight, weight, way.processes - 1, 1, math.nan)
    ended = run_ranks(body, arguments(recipe, tmp_path / "run", way), world_size=way.processes, log=tmp_path / "log")
    assert ended.codes == (EXIT_NO_PROGRESS,) * way.processes, ended.said
    assert "3 steps in a row were skipped" in ended.said
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5
    records = sorted((tmp_path / "run" / "guard").iterdir())
    assert [path.name for path in records] == ["step-00000003.json", "step-00000004.json", "step-00000005.json"]
    record = json.loads(records[0].read_text())
    assert (record["what"], record["ranks"]) == (f"weight {weight}", [way.processes - 1])
    assert record["sequences_of_ranks"][0][0] == 16


def poison(
    name: str, tmp_path: Path, *, value: float, at: int, steps: int = 3, blind: bool = False, **checkpoint: Any
) -> tuple[Any, Path]:
    """A run in which one weight becomes `value` after a step; `blind`: a mistake, saving does not look."""
    way, weight = BY_NAME[name], "transformer.h.2.mlp.c_fc.weight"
    recipe = write_recipe(
        tmp_path, steps=steps, keep=9, guard={"check_every": 0}, schedule={"warmup_steps": 1}, **{"every": 0, **checkpoint}
    )
    body = partial(change_weight, weight, way.processes - 1, at, value, **({"blind": True} if blind else {}))
    ended = run_ranks(body, arguments(recipe, tmp_path / "run", way), world_size=way.processes, log=tmp_path / "log")
    return ended, tmp_path / "run"


@pytest.mark.parametrize("name", ["one", pytest.param("tp2xpp2", marks=pytest.mark.grid)])
@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.grid)])
def test_a_model_that_is_not_finite_is_not_saved(name: str, asynchronous: bool, tmp_path: Path) -> None:
    ended, run = poison(name, tmp_path, value=math.inf, at=1, every=1, checkpoint={"async": asynchronous})
    assert set(ended.codes) == {EXIT_NO_PROGRESS}, ended.said
    assert "tensor transformer.h.2.mlp.c_fc.weight is not finite after step 2 (it began in step 2)" in ended.said
    assert ended.said.count("triaxis: error:") == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"], "the earlier one stays the newest"
    assert not (run / "export").exists()


@pytest.mark.parametrize("name", ["dp2-zero3", *(pytest.param(name, marks=pytest.mark.grid) for name in ("one", "tp2xpp2"))])
def test_a_model_that_is_not_finite_at_the_end_is_not_exported(name: str, tmp_path: Path) -> None:
    ended, run = poison(name, tmp_path, value=math.nan, at=2)
    assert set(ended.codes) == {EXIT_NO_PROGRESS}, ended.said
    assert "is not finite after step 3 (it began in step 3): the model is neither saved nor exported" in ended.said
    assert not (run / "export").exists()


def test_a_run_whose_last_loss_is_not_finite_is_not_done(tmp_path: Path) -> None:
    """The weight is NaN before step 3 of 4, so that no loss is a number from then on."""
    ended, run = poison("one", tmp_path, value=math.nan, at=1, steps=4)
    assert ended.codes == (EXIT_NO_PROGRESS,), ended.said
    assert "the loss is not finite after step 4 (it began in step 3)" in ended.said
    assert not (run / "export").exists()


def test_a_checkpoint_that_is_not_finite_is_not_exported_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended, run = poison("one", tmp_path, value=math.nan, at=2, blind=True, every=3)
    assert ended.codes == (EXIT_NO_PROGRESS,), ended.said
    assert main(["export", str(run), str(tmp_path / "out")]) == EXIT_NO_PROGRESS
    assert "tensor transformer.h.2.mlp.c_fc.weight is not finite after step 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_value_that_the_chosen_format_does_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended, run = poison("one", tmp_path, value=1e5, at=2, every=3)
    assert ended.codes == (0,), ended.said
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "fp16"]) == EXIT_DATA
    told = "tensor transformer.h.2.mlp.c_fc.weight has values up to 1e+05, and fp16 ends at 6.55e+04: nothing is written;"
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "bf16"]) == 0


def spikes_at(steps: Sequence[int], forget: bool, command: Sequence[str]) -> int:
    """`train`, with gradients 100 times too large at some steps; `forget`: a mistake, the history is not taken back."""
    from trainer.checkpoint.checkpoints import Checkpoints
    from trainer.engine.engine import Engine

    gradients = Engine._gradients

    def spiking(engine: Engine, micro_batches: Any, step: int, scale: float) -> Any:
        return gradients(engine, micro_batches, step, scale * (100.0 if step in steps else 1.0))

    Engine._gradients = spiking  # type: ignore[method-assign]
    if forget:
        Checkpoints.memory = {}  # type: ignore[method-assign,assignment]
    return train(command)


@pytest.mark.parametrize("name", ["one", pytest.param("tp2xpp2", marks=pytest.mark.grid)])
def test_the_first_steps_after_a_resume_are_judged_as_in_the_undisturbed_run(name: str, tmp_path: Path) -> None:
    way, steps, at = BY_NAME[name], 16, (12, 13)
    guard = {"on_spike": "skip", "spike_window": 8, "max_skipped": 9}
    recipe = write_recipe(tmp_path, steps=steps, every=4, keep=9, guard=guard)
    run = tmp_path / "run"

    def start(forget: bool = False, **resume: str) -> str:
        command = arguments(recipe, run, way, **resume)
        ended = run_ranks(partial(spikes_at, at, forget), command, world_size=way.processes, log=tmp_path / "log")
        assert not any(ended.codes), ended.said
        return ended.said

    said = start()
    last, twelfth = run / "checkpoints" / f"step-{steps:08d}", run / "checkpoints" / "step-00000012"
    assert "step 13 skipped: the gradient norm" in said
    assert [record["skipped"] for record in read_metrics(run / "metrics.jsonl")][-5:] == [0, 1, 2, 2, 2]
    whole = numbers(run), digests(last), remembered(last)
    start(resume=str(twelfth))
    assert (numbers(run), digests(last), remembered(last)) == whole
    start(forget=True, resume=str(twelfth))
    assert numbers(run) != whole[0], "a forgotten history must be seen"


def bad_data_at(positions: Sequence[int], leave_out: tuple[int, int], command: Sequence[str]) -> int:
    """`train`, in which the data of some steps spikes, and some is left out as a rewind would do it."""
    plant_spikes(positions, leave_out)
    return train(command)


OTHERS = [pytest.param(name, marks=pytest.mark.grid) for name in ("one", "dp2-zero3", "cpu-zero2", "tp2xpp2")]


@pytest.mark.parametrize("name", ["dp2-zero1", *OTHERS])
def test_a_spike_is_undone_and_its_data_left_out(name: str, tmp_path: Path) -> None:
    """The run that rewinds is, to the bit, the one to which that data was never given; also when it is resumed later."""
    way, steps = BY_NAME[name], 16
    guard = {"on_spike": "rewind", "spike_window": 8, "max_skipped": 9}
    recipe = write_recipe(tmp_path, steps=steps, every=4, keep=9, guard=guard, checkpoint={"async": True})

    def start(run: Path, bad: Sequence[int], leave_out: tuple[int, int], **resume: str) -> str:
        command = arguments(recipe, run, way, **resume)
        ended = run_ranks(partial(bad_data_at, bad, leave_out), command, world_size=way.processes, log=tmp_path / "log")
        assert not any(ended.codes), ended.said
        return ended.said

    rewound, spared, never = tmp_path / "rewound", tmp_path / "spared", (steps, 0)
    said = start(rewound, [10], never)
    assert "step 11: spike: grad_norm" in said
    assert "rewound to step 8; the data of 3 steps (24 sequences) is left out" in said
    start(spared, [10], (8, 3))
    assert numbers(rewound) == numbers(spared), "each step once"
    last = Path("checkpoints") / f"step-{steps:08d}"
    assert digests(rewound / last) == digests(spared / last)
    memory = remembered(rewound / last)
    assert memory["memory"]["data"] == {"skipped_steps": 3}
    assert memory["sequences"] == (steps + 3) * 8
    whole = numbers(rewound), digests(rewound / last)
    start(rewound, [10], never, resume=str(rewound / "checkpoints" / "step-00000012"))
    assert (numbers(rewound), digests(rewound / last)) == whole
    assert "rewound to" not in start(rewound, [10], never, resume=str(rewound / "checkpoints" / "step-00000012"))
