"""The counts of a step, and its one normalisation constant."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from parallel.topology import Layout
from trainer.errors import RecipeError
from trainer.schema import Parallel, Recipe


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The cut of a step's sequences: global_sequences = micro_sequences · dp · num_micro_batches.

    Sequences are counted over all ranks unless the name says otherwise; `dp` is the data-parallel
    degree.
    """

    global_sequences: int
    micro_sequences: int
    dp: int
    num_micro_batches: int
    row_tokens: int

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int, how: str) -> BatchPlan:
        """Return the plan of a recipe; RecipeError with the whole equation if it does not hold.

        `how` says where the world size is known from.
        """
        dp = layout_of(recipe.parallel, world_size, how).dp
        batch = recipe.batch
        per_round = batch.micro_sequences * dp
        if batch.global_sequences % per_round:
            raise RecipeError(_equation(recipe, dp, world_size, how))
        return cls(
            global_sequences=batch.global_sequences,
            micro_sequences=batch.micro_sequences,
            dp=dp,
            num_micro_batches=batch.global_sequences // per_round,
            row_tokens=recipe.data.row_tokens,
        )

    @property
    def sequences_per_rank(self) -> int:
        """The sequences of one step on one data-parallel rank."""
        return self.micro_sequences * self.num_micro_batches

    @property
    def tokens_per_step(self) -> int:
        """The tokens of one step over all ranks."""
        return self.global_sequences * self.row_tokens

    @property
    def line(self) -> str:
        """The line that says how a step is cut."""
        return (
            f"step: {self.global_sequences} sequences = micro {self.micro_sequences} × data-parallel {self.dp} × "
            f"{self.num_micro_batches} micro-batches; {self.tokens_per_step:,} tokens"
        )

    def loss_factor(self, num_targets: Any, *, averaged_over: int) -> Any:
        """Return the number by which each micro-batch's loss_sum is multiplied before backward.

        The step's loss is Σ token losses over all ranks and micro-batches / number of targets in
        the step. Gradients of the micro-batches on a rank are summed, but DeepSpeed averages them
        over the ranks that reduce gradients together, `averaged_over` of them, so the factor is
        averaged_over / num_targets. It is the same for every micro-batch: a mean of micro-batch
        means would weigh tokens by how many targets their neighbours have.

        `num_targets`: targets of the whole step, over all ranks; a number, or a tensor of one.
        """
        return averaged_over / num_targets


def layout_of(parallel: Parallel, world_size: int, how: str) -> Layout:
    """Return the layout of that many ranks, known from `how`.

    RecipeError with the factors if they do not divide.
    """
    try:
        return Layout.from_world_size(world_size, pp=parallel.pipeline, cp=parallel.context, tp=parallel.tensor)
    except ValueError:
        replica = parallel.tensor * parallel.pipeline * parallel.context
        raise RecipeError(
            f"world size {world_size} ({how}) is not a multiple of parallel.tensor {parallel.tensor} × pipeline "
            f"{parallel.pipeline} × context {parallel.context} = {replica}; nearest legal world size: "
            f"{_neighbours(world_size, replica)}"
        ) from None


def _equation(recipe: Recipe, dp: int, world_size: int, how: str) -> str:
    batch, degrees = recipe.batch, recipe.parallel
    per_round = batch.micro_sequences * dp
    factors = f"data {dp}" + "".join(
        f" × {axis} {degree}"
        for axis, degree in (("tensor", degrees.tensor), ("pipeline", degrees.pipeline), ("context", degrees.context))
        if degree > 1
    )
    on_each, rest = divmod(batch.global_sequences, dp)
    legal_micro = [str(n) for n in sorted(divisors(on_each)) if n < batch.micro_sequences and not rest]
    other = f", or batch.micro_sequences {', '.join(legal_micro[-3:])}" if legal_micro else ""
    quotient = f"{batch.global_sequences} / ({batch.micro_sequences} · {dp}) = {batch.global_sequences / per_round:g}"
    return (
        f"batch.global_sequences = {batch.global_sequences} is not micro_sequences {batch.micro_sequences} × "
        f"data-parallel {dp} × micro-batches: {quotient}; nearest legal: {_neighbours(batch.global_sequences, per_round)}"
        f"{other} (world size {world_size} = {factors}, from {how})"
    )


def divisors(number: int) -> set[int]:
    """Return all divisors of a number, none of 0, in the time of its square root."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def _neighbours(value: int, step: int) -> str:
    """Return the multiples of `step` on both sides of `value`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
