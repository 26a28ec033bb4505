"""Our orders are those that torch's classes run: what is drawn and checked is what will be executed."""

import doctest
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

import parallel.schedules
from parallel.schedule_table import Action, Kind, Overlap, ScheduleTable, read_csv, write_csv
from parallel.schedules import SCHEDULES, build
from parallel.simulator import peak_in_flight, simulate

MULTI = {
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "looped_bfs": torch_schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
SINGLE = {"gpipe": torch_schedules.ScheduleGPipe, "1f1b": torch_schedules.Schedule1F1B}
MICRO_BATCHES = [*range(1, 17), 32]


def grid(name: str) -> Iterator[tuple[int, int, int]]:
    """(ranks, virtual stages, micro-batches), legal or not in the number of micro-batches."""
    only = SCHEDULES[name].virtual_stages
    for ranks in (2, 4, 8):
        for virtual_stages in (1, 2, 4):
            if only in (None, virtual_stages):
                yield from ((ranks, virtual_stages, n) for n in MICRO_BATCHES)


def stand_in(ranks: int, num_stages: int, rank: int = 0) -> SimpleNamespace:
    """As much of a torch stage as the constructors of schedules look at."""
    return SimpleNamespace(num_stages=num_stages, group_size=ranks, group_rank=rank, stage_index=rank, submod=None)


def test_doctests() -> None:
    result = doctest.testmod(parallel.schedules)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_name_is_compared() -> None:
    assert {*MULTI, *SINGLE} == set(SCHEDULES)


@pytest.mark.parametrize("name", MULTI)
def test_multi_stage_orders_are_torch_s(name: str) -> None:
    """Also legal and illegal numbers of micro-batches; and none of the legal ones deadlocks."""
    refused = 0
    for ranks, virtual_stages, micro_batches in grid(name):
        stages: list[Any] = [stand_in(ranks, ranks * virtual_stages)] * virtual_stages
        if not SCHEDULES[name].accepts(micro_batches, ranks):
            refused += 1
            with pytest.raises(ValueError, match="micro"):
                MULTI[name](stages, micro_batches)
            with pytest.raises(ValueError, match=f"{name} needs"):
                build(name, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=micro_batches)
            continue
        theirs = MULTI[name](stages, micro_batches)
        ours = build(name, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=micro_batches)
        for rank, order in theirs.pipeline_order.items():
            assert [str(step) for step in ours.steps[rank]] == [str(a) for a in order if a is not None]
        assert ours.rank_of_stage == theirs.stage_index_to_group_rank
        assert SCHEDULES[name].rank_of_stage(ranks, virtual_stages) == [rank for _, rank in sorted(ours.rank_of_stage.items())]
        assert ours.splits_backward == SCHEDULES[name].splits_backward
        simulate(ours)
    assert bool(refused) == (name in ("interleaved_1f1b", "interleaved_zero_bubble", "dualpipev"))


class Recorder(SimpleNamespace):
    """A stage that writes down what a single-stage schedule calls. (Its `pipeline_order` is only for drawing, and of 1F1B
    it is wrong: the last rank's forwards are numbered from 1.)"""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__(**vars(stand_in(ranks, ranks, rank)), is_last=rank == ranks - 1, calls=[])

    def no_messages(self, micro_batch: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.calls.append(f"{self.stage_index}F{micro_batch}")

    def backward_one_chunk(self, micro_batch: int, **_: Any) -> None:
        self.calls.append(f"{self.stage_index}B{micro_batch}")

    def perform_reduce_grad(self, factor: int) -> None:
        pass


@pytest.mark.parametrize("name", SINGLE)
def test_single_stage_orders_are_what_torch_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SINGLE[name], "_initialize_stage", lambda *_: None)
    for ranks, virtual_stages, micro_batches in grid(name):
        ours = build(name, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=micro_batches)
        simulate(ours)
        if name == "1f1b" and micro_batches < ranks:  # the order goes on, torch's class does not
            with pytest.raises(ValueError, match="must be greater than"):
                SINGLE[name](stand_in(ranks, ranks), micro_batches)  # type: ignore[arg-type]
            continue
        for rank in range(ranks):
            stage: Any = Recorder(ranks, rank)
            SINGLE[name](stage, micro_batches)._step_microbatches([()] * micro_batches, [{}] * micro_batches)
            assert stage.calls == [str(step) for step in ours.steps[rank]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_table_goes_through_csv_into_torch_s_runtime(name: str, tmp_path: Path) -> None:
    """`_load_csv` lowers it to sends and receives, which fails on a table that deadlocks."""
    virtual_stages = SCHEDULES[name].virtual_stages or 2
    table = build(name, ranks=4, virtual_stages=virtual_stages, num_micro_batches=8)
    write_csv(table, tmp_path / "table.csv")
    assert read_csv((tmp_path / "table.csv").read_text()) == table
    stages: list[Any] = [stand_in(4, 4 * virtual_stages)] * virtual_stages
    runtime = torch_schedules._PipelineScheduleRuntime(stages, 8)
    runtime._load_csv(str(tmp_path / "table.csv"))
    assert runtime.stage_index_to_group_rank == table.rank_of_stage
    for rank, steps in enumerate(table.steps):
        lowered = [str(action) for action in runtime.pipeline_order_with_comms[rank] if action.is_compute_op]
        assert lowered == [str(step) for step in steps]


def test_nearest_micro_batches_are_the_nearest_legal_ones() -> None:
    for schedule in SCHEDULES.values():
        for ranks in (2, 3, 8):
            for wanted in range(1, 40):
                near = schedule.nearest_micro_batches(wanted, ranks)
                legal = [n for n in range(1, 80) if n != wanted and schedule.accepts(n, ranks)]
                assert near == [n for n in legal if n < wanted][-1:] + [n for n in legal if n > wanted][:1]


def test_a_number_of_stages_that_the_schedule_does_not_have() -> None:
    with pytest.raises(ValueError, match="zbv has 2 stages per rank, not 1"):
        build("zbv", ranks=2, virtual_stages=1, num_micro_batches=4)


@pytest.mark.parametrize(
    ("name", "virtual_stages", "held"),
    [
        ("gpipe", 1, [16, 16, 16, 16]),
        ("1f1b", 1, [4, 3, 2, 1]),
        # Rank 0: v p + p - 1 stage inputs = (1 + (p - 1) / (p v)) of 1F1B's p micro-batches: Korthikanti et al. 2022
        # (arXiv:2205.05198), section 4.2.3.
        ("interleaved_1f1b", 2, [11, 9, 7, 5]),
        ("interleaved_zero_bubble", 1, [4, 4, 4, 4]),
        ("zbv", 2, [8, 8, 8, 8]),  # as 1F1B's rank 0
        ("dualpipev", 2, [9, 9, 9, 9]),  # DeepSeek's README: PP + 1 chunks, where PP = 2 p
    ],
)
def test_micro_batches_in_flight_are_the_published_ones(name: str, virtual_stages: int, held: list[int]) -> None:
    table = build(name, ranks=4, virtual_stages=virtual_stages, num_micro_batches=16)
    assert [peak_in_flight(steps) for steps in table.steps] == held


# ---------------------------------------------------------------------------------------------------- tables from files


def test_a_csv_of_pauses_and_overlaps_is_read() -> None:
    table = read_csv(" 0F0 ,,0F1,0B0,0B1,\n,1F0,1I0,,(1F1;1I1)OVERLAP_F_B,1W0,1W1")
    assert [str(step) for step in table.steps[0]] == ["0F0", "0F1", "0B0", "0B1"]
    assert table.steps[1][2] == Overlap(Action(1, Kind.FORWARD, 1), Action(1, Kind.INPUT_GRAD, 1))
    assert (table.num_ranks, table.num_stages, table.num_micro_batches, table.stages(1)) == (2, 2, 2, [1])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0F0,0B0", "1F0,1BO"], "row 2, column 2: '1BO' is not an action; legal: stage, F, B, I or W, micro-batch, as in 2F0"),
        (["0F0,0SEND_F0,0B0"], "row 1, column 2: '0SEND_F0' is not an action"),
        (["0F,0B0"], "row 1, column 1: '0F' is not an action"),
        (["0F0,0B0x"], "row 1, column 2: '0B0x' is not an action"),
        (["0F0,(0B0;0F1)OVERLAP_F_B"], "is not an action"),
        (["0F0,0F9999999"], "is not an action"),
        (["0F0,0B0", ""], None),
        (["0F0,0B0", ",", "1F0,1B0"], "rank 1 has no actions"),
        ([], "it has no ranks"),
        (["0F0,1F0,0B0", "1B0"], "stage 1 is on rank 0 and on rank 1"),
        (["0F0,0B0", "2F0,2B0"], "stage 1 is on no rank"),
        (["0F0,0B0", "1F0"], "stage 1 has F of micro-batch 0; it must have F and B or F, I and W"),
        (["0F0,0B0", "1F0,1I0"], "stage 1 has F, I of micro-batch 0"),
        (["0F0,0B0,0F2,0B2"], "stage 0 has nothing of micro-batch 1"),
        (["0F0,0B0,0F0"], "stage 0 has F, B, F of micro-batch 0"),
    ],
)
def test_what_is_no_schedule_is_said(rows: list[str], said: str | None) -> None:
    text = "\n".join(rows)
    if said is None:
        assert read_csv(text).num_ranks == 1
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        read_csv(text)
    assert said in str(error.value)


def test_a_table_without_ranks_is_none() -> None:
    with pytest.raises(ValueError, match="no ranks"):
        ScheduleTable(())
