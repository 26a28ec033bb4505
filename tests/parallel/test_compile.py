"""Steps compiled between their matrix products (train.compile) against steps that are not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from parallel import fusable
from parallel.documents import Documents
from parallel.fusable import FUSING
from parallel.mesh import Mesh
from parallel.topology import Layout
from tests.parallel.training import Case, Outcome, make_engine, micro_batches, run_case
from tests.spawn import spawn

# Of rounding: bf16 has 8 bits, and a fused function rounds once where the written one rounds after
# every operation.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
CASES = {
    "fp32": Case(),
    "bf16": Case(dtype="bf16"),
    **{f"zero-{stage}": Case(dp=2, stage=stage) for stage in range(4)},
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "pp2": Case(pp=2, accumulation=4),
    "split-backward": Case(pp=2, accumulation=4, schedule="zbv", virtual_stages=2, config={"num_hidden_layers": 4}),
    "recompute-full": Case(recompute="full"),
    "recompute-selective": Case(recompute="selective"),
    "lora": Case(tuning={"method": "lora", "rank": 2}),
}


def compiled_run(mesh: Mesh, case: Case, folder: Path) -> tuple[Outcome, str | None, int]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    outcome = run_case(mesh, replace(case, compile=True))
    return outcome, FUSING.failure, counters["stats"]["unique_graphs"]


def packed_runs(mesh: Mesh) -> list[int]:
    """Return the compilations so far after each of 20 steps, whose documents differ."""
    fusable.BACKEND = "aot_eager"  # which needs no C++ compiler, and is asked as often
    engine = make_engine(mesh, Case(sequences=2, compile=True))
    compilations = []
    for step in range(20):
        cut = 1 + step % 15
        packed = [replace(batch, documents=Documents(((cut, 16 - cut),) * 2)) for batch in micro_batches(mesh, engine.plan, 0)]
        engine.step(packed, step=step, lr=0.1)
        compilations.append(counters["stats"]["unique_graphs"])
    engine.close()
    assert FUSING.failure is None
    return compilations


def failing_run(mesh: Mesh, folder: Path) -> tuple[list[float], str | None]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    torch._inductor.config.cpp.cxx = ("/bin/false",)
    return run_case(mesh, Case(compile=True, steps=1)).losses, FUSING.failure


@pytest.fixture(scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder in which one layout finds what another has compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.grid
@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_weights_are_those_of_steps_that_are_not_compiled(name: str, compiled_code: Path) -> None:
    case = CASES[name]
    layout = Layout(pp=case.pp, dp=case.dp, tp=case.tp)
    plain = spawn(run_case, layout, case)[0]
    for compiled, failure, graphs in spawn(compiled_run, layout, case, compiled_code):
        assert failure is None
        assert graphs > 0
        rtol = TOLERANCE[case.dtype]
        np.testing.assert_allclose(compiled.losses, plain.losses, rtol=rtol)
        np.testing.assert_allclose(compiled.norms, plain.norms, rtol=rtol)
        assert compiled.eval_loss == pytest.approx(plain.eval_loss, rel=rtol)


def test_packings_compile_nothing_anew() -> None:
    [compilations] = spawn(packed_runs, Layout())
    assert compilations[0] > 0
    assert compilations[-1] == compilations[0]


def test_a_compiler_that_fails_leaves_the_step_as_it_is(tmp_path: Path) -> None:
    [(losses, failure)] = spawn(failing_run, Layout(), tmp_path)
    assert failure is not None
    assert "\n" not in failure
    assert losses == spawn(run_case, Layout(), Case(steps=1))[0].losses
