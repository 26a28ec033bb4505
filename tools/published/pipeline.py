"""The zero-bubble paper's pipelines (Qi et al. 2023, arXiv:2401.10241, tables 3 to 6) next to our
schedules, simulator and step times.

Their bubble rate is (cost - m (F + B + W)) / cost, where cost is the time of the whole schedule
with every stage as long as a middle one, and a result reaches the next rank T_comm after it is
there. 1F1B, its interleaved form, ZB-H1 and ZB-V are ours; ZB-H2 is not, and is written out here.
ZB-1p and ZB-2p are the best orders that a search finds in 1F1B's memory and in twice that: at these
durations the first is as good as ZB-H1, and the second has no rows here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from parallel.schedule_table import Action, Kind, ScheduleTable
from parallel.schedules import build
from parallel.simulator import Costs, simulate
from parallel.topology import Layout
from tools.published.comparison import Compared, Row, Table, rows_of
from tools.published.step_times import A100_80, KORTHIKANTI, MEGATRON, OF_KORTHIKANTI, Measured, gpt
from trainer.planner.devices import Link
from trainer.planner.in_flight import Kept, by_name
from trainer.planner.step_time import Job, stage_costs

OURS = {
    "1F1B": "1f1b",
    "1F1B-I": "interleaved_1f1b",
    "ZB-H1": "interleaved_zero_bubble",
    "ZB-1p": "interleaved_zero_bubble",
    "ZB-V": "zbv",
}
H2 = "ZB-H2"
# Their nodes of eight are joined by RoCE at an unknown rate; T_comm is that of one message.
ROCE = replace(A100_80, outside=Link(rate=25e9, latency=25e-6, share=0.85))
SYMBOLS = 50304


class Point(NamedTuple):
    """The shape of a schedule, with the durations of a stage's actions and of a message [ms]."""

    schedule: str
    ranks: int
    virtual_stages: int
    micro_batches: int
    costs: Costs
    latency: float

    @classmethod
    def of(cls, row: Row) -> Point:
        chunks = int(row["vpp_chunks"])
        forward, input_grad, weight_grad = (float(row[key]) / chunks for key in ("T_F_ms", "T_B_ms", "T_W_ms"))
        return cls(
            row["schedule"],
            int(row["pp"]),
            chunks,
            int(row["num_microbatches"]),
            Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad),
            float(row["T_comm_ms"]),
        )

    @property
    def table(self) -> ScheduleTable:
        if self.schedule == H2:
            return zb_h2(self.ranks, self.micro_batches)
        named, stages = OURS[self.schedule], self.virtual_stages
        return build(named, ranks=self.ranks, virtual_stages=stages, num_micro_batches=self.micro_batches)

    @property
    def bubble_rate(self) -> float:
        costs = self.costs
        whole = self.virtual_stages * self.micro_batches * (costs.forward + costs.input_grad + costs.weight_grad)
        cost = simulate(self.table, costs, latency=self.latency).makespan
        return (cost - whole) / cost


def zb_h2(ranks: int, micro_batches: int) -> ScheduleTable:
    """Return ZB-H2 (the paper, section 2.2): so many forwards run ahead that the last rank's are
    never late, and as many weight gradients are put off as fill the end."""
    steps = []
    for rank in range(ranks):
        ahead = min(2 * (ranks - rank) - 1, micro_batches)
        forwards = deque(range(ahead, micro_batches))
        order = [Action(rank, Kind.FORWARD, number) for number in range(ahead)]
        for number in range(micro_batches):
            order.append(Action(rank, Kind.INPUT_GRAD, number))
            if number >= 2 * rank:
                order.append(Action(rank, Kind.WEIGHT_GRAD, number - 2 * rank))
            if forwards:
                order.append(Action(rank, Kind.FORWARD, forwards.popleft()))
        order += [Action(rank, Kind.WEIGHT_GRAD, n) for n in range(max(0, micro_batches - 2 * rank), micro_batches)]
        steps.append(tuple(order))
    return ScheduleTable(tuple(steps))


def rows(folder: Path) -> list[Row]:
    return [row for row in rows_of(folder, "zero_bubble_schedules_half") if row["schedule"] in OURS]


def bubble_rates(folder: Path) -> Iterator[Compared]:
    """Yield the share of the schedule's time that is idle."""
    for row in rows_of(folder, "zero_bubble_schedules_half"):
        if row["schedule"] not in (*OURS, H2):
            continue
        yield Compared(what=_what(row), published=float(row["bubble_rate"]), ours=Point.of(row).bubble_rate)


def stage_times(folder: Path) -> Iterator[Compared]:
    """Yield a middle stage's forward, and its backward whole, on a micro-batch [ms]."""
    for row in rows(folder):
        if row["schedule"] != "1F1B":
            continue
        costs = stage_costs(_job(row), ROCE)[1]
        backward = float(row["T_B_ms"]) + float(row["T_W_ms"])
        work = Measured("", 1.0, _job(row)).flops / int(row["pp"]) / int(row["num_microbatches"]) / 3
        yield Compared(what=f"{_what(row)}, forward", published=float(row["T_F_ms"]), ours=1e3 * costs.forward, work=work)
        yield Compared(
            what=f"{_what(row)}, backward",
            published=backward,
            ours=1e3 * (costs.input_grad + costs.weight_grad),
            work=2 * work,
        )


def steps(folder: Path) -> Iterator[Compared]:
    """Yield the time of a step, from the measured samples/s."""
    for row in rows(folder):
        if row["samples_per_s_per_gpu"]:
            samples = int(row["num_microbatches"]) * int(row["microbatch_seqs"])
            seconds = samples / float(row["samples_per_s_per_gpu"]) / int(row["gpus"])
            one = Measured(_what(row), seconds, _job(row)).on(ROCE)
            yield replace(one, sweep=f"{row['model']}, {row['num_microbatches']} micro-batches")


def peaks(folder: Path) -> Iterator[Compared]:
    """Yield the peak memory of the fullest rank [GB]."""
    for row in rows(folder):
        if row["peak_memory_gb"] and row["vpp_chunks"] == "1":
            ranks = int(row["pp"])
            ours = max(_peak(row, rank) for rank in {0, 1, ranks - 1})
            params = _params(row, 1)
            yield Compared(what=_what(row), published=float(row["peak_memory_gb"]), ours=ours / 1e9, work=params)


def _peak(row: Row, rank: int) -> float:
    """Return the bytes of states, 16 for each parameter, and of activations: until the gradients of
    inputs as in Korthikanti et al. 2022, eq. 1, from then on 32 of each feature (the paper, table
    1)."""
    job = _job(row)
    heads, hidden, length = (int(row[key]) for key in ("heads", "hidden_size", "seq_len"))
    features = length * hidden * job.micro_sequences * job.stages[rank]
    kept = Kept(round(features * (34 + 5 * heads * length / hidden)), 32 * features)
    in_flight = by_name(
        job.schedule,
        ranks=job.layout.pp,
        virtual_stages=1,
        num_micro_batches=job.num_micro_batches,
        rank=rank,
        of_stage={rank: kept},
    )
    return 16 * _params(row, rank) + in_flight.num_bytes({rank: kept})


def _params(row: Row, rank: int) -> float:
    hidden, job = int(row["hidden_size"]), _job(row)
    embedded = SYMBOLS * hidden if rank in (0, job.layout.pp - 1) else 0
    return job.stages[rank] * 12 * hidden**2 + embedded


def _what(row: Row) -> str:
    return f"{row['model']} {row['schedule']}, {row['num_microbatches']} micro-batches"


def _job(row: Row) -> Job:
    ranks, layers = int(row["pp"]), int(row["layers"])
    each = (layers + 2) // ranks
    return Job(
        network=gpt(int(row["hidden_size"]), layers, int(row["heads"]), int(row["seq_len"]), SYMBOLS),
        layout=Layout(tp=1, pp=ranks, dp=1),
        kernels=MEGATRON,
        dtype="fp16",
        seq_len=int(row["seq_len"]),
        micro_sequences=int(row["microbatch_seqs"]),
        num_micro_batches=int(row["num_microbatches"]),
        schedule=OURS[row["schedule"]],
        gradient_bytes=2,
        balance=(each - 1, *[each] * (ranks - 2), each - 1),
    )


BUBBLES = Table(title="Zero bubble, table 5", what="bubble rate", rows=bubble_rates, absolute=True)
TIMES = (
    Table(
        title="Zero bubble, table 5", what="T_F, T_B + T_W [ms]", rows=stage_times, fitted=OF_KORTHIKANTI, reference=KORTHIKANTI
    ),
    Table(title="Zero bubble, table 4", what="step [s]", rows=steps, fitted=OF_KORTHIKANTI, reference=KORTHIKANTI),
)
PEAKS = Table(title="Zero bubble, table 4", what="peak memory [GB]", rows=peaks)
