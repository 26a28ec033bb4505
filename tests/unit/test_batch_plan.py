import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.errors import RecipeError
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Batch, Data, Parallel, Recipe


def recipe(total: int, micro: int, *, tensor: int = 1, seq_len: int = 16) -> Recipe:
    return Recipe(
        batch=Batch(global_sequences=total, micro_sequences=micro),
        parallel=Parallel(tensor=tensor),
        data=Data(seq_len=seq_len),
    )


def test_counts_of_a_plan() -> None:
    plan = BatchPlan.from_recipe(recipe(24, 2), 3, "a test")
    assert (plan.dp, plan.num_micro_batches, plan.sequences_per_rank, plan.tokens_per_step) == (3, 4, 8, 24 * 16)


def test_the_equation_names_every_factor_and_the_nearest_legal_values() -> None:
    with pytest.raises(RecipeError) as refused:
        BatchPlan.from_recipe(recipe(12, 4, tensor=2), 4, "RANK and WORLD_SIZE of the launcher")
    assert refused.value.lines == [
        "batch.global_sequences = 12 is not micro_sequences 4 × data-parallel 2 × micro-batches: 12 / (4 · 2) = 1.5; "
        "nearest legal: 8 or 16, or batch.micro_sequences 1, 2, 3 (world size 4 = data 2 × tensor 2, "
        "from RANK and WORLD_SIZE of the launcher)"
    ]
    assert refused.value.exit_code == 78


def test_fewer_sequences_than_ranks_offers_only_what_exists() -> None:
    with pytest.raises(RecipeError, match=r"nearest legal: 8 \("):
        BatchPlan.from_recipe(recipe(3, 1), 8, "a test")


def test_the_largest_batch_is_answered_like_a_small_one() -> None:
    """The neighbours are found among the divisors; trying each number up to it would take minutes."""
    with pytest.raises(RecipeError, match=r"or batch\.micro_sequences 134217728, 268435456, 536870912 \(world size 1"):
        BatchPlan.from_recipe(recipe(2**30, 2**30 - 1), 1, "a test")


def test_world_size_that_the_degrees_do_not_divide() -> None:
    with pytest.raises(RecipeError, match=r"world size 3 \(a test\) is not a multiple of parallel.tensor 2.*: 2 or 4"):
        BatchPlan.from_recipe(recipe(8, 1, tensor=2), 3, "a test")


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_a_plan_holds_every_sequence_once_or_is_refused(total: int, micro: int, world: int) -> None:
    try:
        plan = BatchPlan.from_recipe(recipe(total, micro), world, "a test")
    except RecipeError:
        assert total % (micro * world)
    else:
        assert plan.dp * plan.num_micro_batches * plan.micro_sequences == total == plan.dp * plan.sequences_per_rank


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.lists(st.floats(0, 10), max_size=5), min_size=1, max_size=8))
def test_loss_factor_gives_the_mean_over_targets_after_averaging_over_ranks(dp: int, micro_batches: list[list[float]]) -> None:
    """Rank r takes every dp-th micro-batch; gradients are linear in the loss, so the losses stand for them."""
    losses = [loss for batch in micro_batches for loss in batch]
    plan = BatchPlan(global_sequences=dp, micro_sequences=1, dp=dp, num_micro_batches=1, row_tokens=8)
    assume(losses)
    factor = plan.loss_factor(len(losses), averaged_over=dp)
    ranks = [sum(sum(batch) * factor for batch in micro_batches[r::dp]) for r in range(dp)]
    assert sum(ranks) / dp == pytest.approx(sum(losses) / len(losses), rel=1e-12)
