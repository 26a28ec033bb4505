"""The size of a bucket of gradients. No torch, so that the planner knows it too."""

from __future__ import annotations

from trainer.schema import Zero

KEY = "reduce_bucket_size"
# Elements. Between CPUs messages of this size are as fast as larger ones, and gradients are still
# in the cache: with 35 million parameters ZeRO-3 held 130 MB less than with one bucket.
ON_CPU = 1 << 23


def bucket_size(asked: int, gradients: int, *, on_cpu: bool) -> int:
    """Return the elements of a bucket: no more than all gradients together, and on CPUs fewer than
    the default. `asked`: the recipe's zero.reduce_bucket_size."""
    left_open = on_cpu and asked == Zero.model_fields[KEY].default
    return min(ON_CPU if left_open else asked, gradients)
