"""The work of DeepSpeed 0.19 beside forward and backward, at each stage of ZeRO: the passes over
weights and gradients, the collectives, the update, and what goes to host memory and NVMe. Counted
from its runtime/engine.py, bf16_optimizer.py, zero/stage_1_and_2.py and zero/stage3.py. No torch.

P elements are trained on a rank, p = P / ranks are its part; i: bytes of a number in the compute
format, r: of one that is reduced. Gradients are summed over micro-batches in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from trainer.planner.collectives import all_gather, all_reduce, link_of, reduce_scatter
from trainer.planner.devices import Device, Link
from trainer.planner.operations import Move
from trainer.planner.roofline import longer, moves_s

WIDE = 4  # bytes of fp32
# A tensor made new is written once and read from others twice where its speed was measured
# (a · b): so a copy into new memory takes as long as three passes over it.
MADE = 3
# Adam reads the master weight, its gradient and two moments, and writes all but the gradient.
ADAM_PASSES = 7
# Operations that Python issues for a tensor: at stages 1 and 2 for its part of a bucket and for its
# gradient's norm and check, and for the hook of each module at stage 3.
REDUCED_CALLS, UPDATED_CALLS, HOOK_CALLS = 5, 8, 12
# Where a host copies and updates without page-locked memory of a device, these are its rates unless
# the sheet has others: PCIe 4.0 with 16 lanes; 8 channels of DDR4-3200 for eight devices; disks.
PCIE, HOST_ADAM, NVME_READ, NVME_WRITE = 25e9, 1.5e9, 3e9, 1.5e9


@dataclass(frozen=True, kw_only=True)
class ZeroJob:
    """The weights of the rank that has the most, and how DeepSpeed holds them.

    | field | meaning |
    |---|---|
    | `ranks`, `stride` | the data-parallel ranks, and how far they are apart |
    | `trained`, `frozen` | elements of weights on this rank |
    | `tensors`, `modules` | trained ones; modules with hooks at stage 3 |
    | `divided` | elements that stage 3 gathers for use |
    | `live` | elements that it keeps once gathered |
    | `itemsize`, `reduced` | bytes of a number in the compute format, and in that of reductions |
    | `dtype` | the compute format |
    | `overlaps` | reductions and gathers run beside the computation, where the device can |
    | `optimizer_on`, `weights_on` | "none", "cpu", "nvme" |
    | `states` | fp32 numbers of a weight in the optimizer, the master weight not counted |
    """

    stage: int
    ranks: int
    stride: int
    trained: float
    frozen: float
    tensors: float
    modules: float
    divided: float
    live: float
    itemsize: int
    reduced: int
    dtype: str
    micro_batches: int
    overlaps: bool
    optimizer_on: str
    weights_on: str
    states: int


@dataclass(frozen=True)
class ZeroStep:
    """The times of it on a device [s]."""

    job: ZeroJob
    device: Device

    def with_share(self, elements: float) -> ZeroStep:
        """Return those of a part of the rank's weights, such as a stage's."""
        job = self.job
        share = min(1.0, elements / max(1.0, job.trained + job.frozen))
        keys = ("trained", "frozen", "tensors", "modules", "divided", "live")
        return ZeroStep(replace(job, **{key: share * getattr(job, key) for key in keys}), self.device)

    # ------------------------------------------------------------------------ in each micro-batch

    def forward(self, computed: float) -> float:
        """Return the seconds that a forward of so many seconds takes longer."""
        return self._hooks(2 * self.job.modules) + self._exposed(self.gathers[0], computed)

    def backward(self, computed: float) -> float:
        """Return the seconds that a backward of so many seconds takes longer."""
        communication = self.gathers[1] + (self._reduction if self.job.stage >= 2 else 0.0)
        return self._hooks(self.job.modules) + self._summing + self._exposed(communication, computed)

    @cached_property
    def gathers(self) -> tuple[float, float]:
        """Return the seconds of gathering the weights of stage 3, for forward and for backward:
        those that are not kept are gathered again."""
        if self.job.stage < 3:
            return 0.0, 0.0
        return self._gather(self.job.divided), self._gather(max(0.0, self.job.divided - self.job.live))

    def _exposed(self, communication: float, computed: float) -> float:
        """Return the seconds by which communication makes a computation longer."""
        if self.job.overlaps and self.device.asynchronous:
            return longer(computed, communication) - computed
        return communication

    # ------------------------------------------------------------------------ after them

    @cached_property
    def reduction(self) -> float:
        """Return the seconds of the one reduction of a step, at stages 0 and 1."""
        P = self.job.trained
        if self.job.stage == 0 or self._in_flat_fp32:
            # Made flat; divided by the ranks; copied back.
            moved = self._made(WIDE * P) + self._passes(4 * WIDE * P)
            return moved + all_reduce(WIDE * P, self.job.ranks, self._link)
        return self._in_buckets(WIDE, WIDE) if self.job.stage == 1 else 0.0

    @cached_property
    def update(self) -> float:
        """Return the seconds of norm, clipping, optimizer, rounding, and gathering the weights."""
        job, i = self.job, self.job.itemsize
        P, p = job.trained, job.trained / (job.ranks if job.stage else 1)
        calls = self._calls(UPDATED_CALLS * job.tensors)
        if job.stage == 0:
            # The norm; shrunk; updated; gradients set to 0.
            return calls + self._passes((1 + 2 + 1) * WIDE * P) + self._adam(P)
        rounded = self._passes((WIDE + i) * p)
        if self._in_flat_fp32:
            # The norm and shrinking of all gradients, which are set to 0 afterwards.
            passes = self._passes((1 + 2 + 1) * WIDE * P)
            return calls + passes + self._adam(p) + rounded + self._gather_weights(i * P)
        if job.optimizer_on != "none":
            return calls + self._offloaded(p) + self._gather_weights(self._kept_whole)
        # Searched for what is not finite (twice); the norm; made flat; shrunk.
        passes = self._passes((2 * (job.stage < 3) + 1 + 2) * WIDE * p) + self._made(WIDE * p)
        return calls + passes + self._adam(p) + rounded + self._gather_weights(self._kept_whole)

    def _offloaded(self, p: float) -> float:
        """Return the seconds of the update in the host's memory: the gradients come there, are
        shrunk and used, and rounded weights go back. With NVMe all states come from it and
        return."""
        job, device = self.job, self.device
        to_host = 0.0 if device.speed else WIDE * p / (device.to_host or PCIE)
        to_device = 0.0 if device.speed else job.itemsize * p / (device.to_device or PCIE)
        on_host = self._host_passes((2 + 2 + 1 + 1) * WIDE * p + 2 * (WIDE + job.itemsize) * p)
        swapped = 0.0
        if job.optimizer_on == "nvme":
            states = (1 + job.states) * WIDE * p
            swapped = (states + WIDE * p) / (device.nvme_read or NVME_READ)
            swapped += (states + WIDE * p) / (device.nvme_write or NVME_WRITE)
        return to_host + on_host + self._host_adam(p) + to_device + swapped

    # ------------------------------------------------------------------------ parts

    @property
    def _in_flat_fp32(self) -> bool:
        """Return whether DeepSpeed's bf16 optimizer runs, which sums gradients in a flat buffer."""
        return self.job.stage == 1 and self.job.dtype == "bf16" and self.job.optimizer_on == "none"

    @property
    def _summing(self) -> float:
        """Return the seconds of adding the gradients of a micro-batch to those before it, where
        torch or DeepSpeed does so on each rank alone."""
        job, P, i = self.job, self.job.trained, self.job.itemsize
        if job.stage == 0:
            return self._passes(3 * WIDE * P)
        if self._in_flat_fp32:
            # Gradients set to 0, added by torch, made fp32, added.
            return self._passes((1 + 3) * i * P + 3 * WIDE * P) + self._made(WIDE * P)
        if job.stage == 1:
            later = (job.micro_batches - 1) / job.micro_batches
            return later * self._passes(3 * WIDE * P) + (i < WIDE) * self._made(WIDE * P)
        if job.stage == 2 and job.optimizer_on == "none":
            # Added to this rank's part; in a half format that is a buffer made of zeros each step.
            part = WIDE * P / job.ranks
            return self._passes(3 * part) + (i < WIDE) * self._made(part) / job.micro_batches
        return 0.0

    @property
    def _reduction(self) -> float:
        """Return the seconds of reducing the gradients of a micro-batch, at stages 2 and 3."""
        job = self.job
        if job.stage == 2:
            return self._in_buckets(job.itemsize, job.reduced)
        P, i, r = job.trained, job.itemsize, job.reduced
        # Copied into the bucket; made the format of reductions; laid side by side by ranks;
        # divided; this rank's part copied or added.
        moved = self._passes((2 * i + 2 * r) * P + 3 * WIDE * P / job.ranks)
        moved += self._made(r * P) * (1 + (r != i))
        return self._calls(REDUCED_CALLS * job.tensors) + moved + reduce_scatter(r * P, job.ranks, self._link)

    def _in_buckets(self, i: int, r: int) -> float:
        """Return the seconds of one reduction through the buckets of stages 1 and 2, an all-reduce
        of which each rank keeps its part."""
        job = self.job
        P, p = job.trained, job.trained / job.ranks
        # Copied into a new bucket; divided by the ranks; made flat; made the format of reductions;
        # this rank's part copied back, and out of the bucket.
        moved = self._made(i * P) + self._passes(2 * i * P) + self._made(i * P)
        moved += (r != i) * self._made(r * P) + self._passes((r + i) * p) + self._made(i * p)
        return self._calls(REDUCED_CALLS * job.tensors) + moved + all_reduce(r * P, job.ranks, self._link)

    @property
    def _kept_whole(self) -> float:
        """Return the bytes of weights that are gathered after the update: all, or at stage 3 those
        that are kept whole."""
        job = self.job
        whole = max(0.0, job.trained - job.divided) if job.stage == 3 else job.trained
        return job.itemsize * whole

    def _gather(self, elements: float) -> float:
        if not elements:
            return 0.0
        job, device = self.job, self.device
        num_bytes = job.itemsize * elements
        fetched = 0.0
        if job.weights_on != "none" and not device.speed:
            fetched += num_bytes / job.ranks / (device.to_device or PCIE)
        if job.weights_on == "nvme":
            fetched += num_bytes / job.ranks / (device.nvme_read or NVME_READ)
        return fetched + self._gather_weights(num_bytes)

    def _gather_weights(self, num_bytes: float) -> float:
        return all_gather(num_bytes, self.job.ranks, self._link)

    @property
    def _link(self) -> Link:
        return link_of(self.device, self.job.ranks, self.job.stride)

    def _passes(self, num_bytes: float) -> float:
        """Return the seconds in which tensors that are there are read and written."""
        return moves_s([Move(num_bytes, 1, "reused", 0, "fp32")], self.device)

    def _made(self, num_bytes: float) -> float:
        """Return the seconds in which a copy of so many bytes is made."""
        passes = MADE if self.device.speed else 2
        return moves_s([Move(passes * num_bytes, 1, "fresh", 0, "fp32")], self.device)

    def _host_passes(self, num_bytes: float) -> float:
        if self.device.speed:
            return self._passes(num_bytes)
        adam = self.device.host_adam or HOST_ADAM  # it is as fast as the host's memory
        return num_bytes / (adam * ADAM_PASSES * WIDE)

    def _adam(self, elements: float) -> float:
        if self.device.speed:
            return self.device.speed.adam_s(elements)
        passes = 3 + 2 * self.job.states
        return self._passes(passes * WIDE * elements)

    def _host_adam(self, elements: float) -> float:
        if self.device.speed:
            return self.device.speed.adam_s(elements)
        return elements / (self.device.host_adam or HOST_ADAM)

    def _hooks(self, number: float) -> float:
        return self._calls(HOOK_CALLS * number) if self.job.stage == 3 else 0.0

    def _calls(self, number: float) -> float:
        """Return the seconds in which Python issues so many operations; a device that runs behind
        its host has work to do meanwhile."""
        return self.device.speed.calls_s(number) if self.device.speed else number * self.device.call / 4
