from collections.abc import Sequence

import pytest
import torch

from trainer.generate import sample

V = 11


def next_logits(tokens: Sequence[int]) -> torch.Tensor:
    """Prefers the successor of the last token, by a margin that depends on the context's length."""
    logits = torch.zeros(V)
    logits[(tokens[-1] + 1) % V] = 1.0 + len(tokens) / 10
    return logits


def run(**changes: object) -> list[int]:
    options = {"new_tokens": 6, "context": 4, "end": 10, "temperature": 0.0, "top_k": V, "seed": 0} | changes
    return sample(next_logits, [1, 2], **options)


def test_temperature_zero_follows_the_likeliest_token() -> None:
    assert run() == [3, 4, 5, 6, 7, 8]


def test_it_stops_at_the_end_of_the_document_and_leaves_that_out() -> None:
    assert run(new_tokens=50) == [3, 4, 5, 6, 7, 8, 9]


def test_the_model_never_sees_more_than_its_context() -> None:
    seen = []

    def spy(tokens: Sequence[int]) -> torch.Tensor:
        seen.append(list(tokens))
        return next_logits(tokens)

    sample(spy, [1, 2], new_tokens=4, context=3, end=10, temperature=0.0, top_k=V, seed=0)
    assert seen == [[1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_sampling_depends_on_the_seed_and_nothing_else() -> None:
    first = run(temperature=1.0)
    torch.manual_seed(99)
    assert run(temperature=1.0) == first
    assert any(run(temperature=1.0, seed=seed) != first for seed in range(1, 6))


@pytest.mark.parametrize("seed", range(5))
def test_top_k_leaves_only_the_likeliest(seed: int) -> None:
    assert run(temperature=5.0, top_k=1, seed=seed) == run()
