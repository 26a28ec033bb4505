"""Rules of tensor parallelism: the sizes that a recipe's tensor ranks must divide."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.model.config import TransformerConfig
from trainer.model.families import FAMILIES
from trainer.schema import Finding, Recipe


def tensor_findings(recipe: Recipe, config: TransformerConfig) -> Iterator[Finding]:
    """Yield a finding for each set of sizes that the tensor ranks do not divide."""
    degree = recipe.parallel.tensor
    if wrong := _undivided(config, degree):
        hf_names = {rule.fields[0]: name for name, rule in FAMILIES[config.family].keys.items()}
        sizes = [f"{hf_names[field]} = {getattr(config, field)}" for field in wrong]
        legal = [str(d) for d in range(1, config.num_heads + 1) if not _undivided(config, d)]
        yield Finding(
            ("parallel.tensor", "model.config"),
            f"parallel.tensor = {degree} does not divide {' and '.join(sizes)} of the network; legal: {', '.join(legal)}",
        )
    tokens = recipe.batch.micro_sequences * recipe.data.seq_len
    if recipe.parallel.divides_tokens and tokens % degree:
        yield Finding(
            ("parallel.tensor", "parallel.sequence_parallel", "batch.micro_sequences", "data.seq_len"),
            f"parallel.tensor = {degree} does not divide the {tokens} tokens of a micro-batch (batch.micro_sequences "
            f"{recipe.batch.micro_sequences} × data.seq_len {recipe.data.seq_len}), which sequence parallelism divides; "
            f"legal: a data.seq_len that is a multiple of {degree}, or parallel.sequence_parallel false",
        )


def _undivided(config: TransformerConfig, degree: int) -> list[str]:
    """Return the sizes that tensor ranks divide and that this many cannot.

    There may be fewer key/value heads than ranks: ranks then share one.
    """
    wrong = [field for field in ("num_heads", "ffn_size") if getattr(config, field) % degree]
    kv_heads = config.num_kv_heads
    if kv_heads != config.num_heads and kv_heads % degree and degree % kv_heads:
        wrong.insert(1, "num_kv_heads")
    return wrong
