"""Token and position embeddings (Shoeybi et al. 2019, arXiv:1909.08053, §3).

Shape letters: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from parallel.collectives import reduce_from_group
from parallel.mesh import Group
from parallel.params import Init, Piece, Role, Sharded, ShardSpec, whole


def vocabulary_shard(vocab_size: int, group: Group) -> tuple[int, int]:
    """(first, rows): this rank's rows of a vocabulary padded to a multiple of the degree; the padding is at the end."""
    rows = -(-vocab_size // group.size)
    return group.rank * rows, rows


def vocabulary_piece(name: str, vocab_size: int, hidden_size: int, group: Group) -> Piece:
    """The real, unpadded rows of a [V, D] tensor that this rank holds; none on a rank that holds only padding."""
    first, rows = vocabulary_shard(vocab_size, group)
    first = min(first, vocab_size)
    return Piece(name, (vocab_size, hidden_size), (first, 0), (min(rows, vocab_size - first), hidden_size))


class VocabParallelEmbedding(Sharded):
    """Rows of the embedding matrix E divided over the vocabulary: Y = Σ_i E_i[tokens], a token being in one E_i only.

    Forward: tokens [B, S] → [B, S, D] replicated, one all-reduce over `group`. Backward: each rank keeps its rows'
    gradient, no communication.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, name: str, init: Init, group: Group) -> None:
        super().__init__()
        self.group = group
        self.first, rows = vocabulary_shard(vocab_size, group)
        piece = vocabulary_piece(name, vocab_size, hidden_size, group)
        self.declare("weight", (rows, hidden_size), ShardSpec(Role.EMBEDDING, init, (piece,), group.size > 1))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        if self.group.size == 1:
            return functional.embedding(tokens_BS, self.weight)
        local_BS = tokens_BS - self.first
        elsewhere_BS = (local_BS < 0) | (local_BS >= self.weight.shape[0])
        y_BSD = functional.embedding(local_BS.masked_fill(elsewhere_BS, 0), self.weight)
        return reduce_from_group(y_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0.0), self.group)


class PositionEmbedding(Sharded):
    """Learned positions [max_positions, D], whole on every rank."""

    def __init__(self, max_positions: int, hidden_size: int, *, name: str, init: Init) -> None:
        super().__init__()
        shape = (max_positions, hidden_size)
        self.declare("weight", shape, whole(name, shape, role=Role.EMBEDDING, init=init))

    def forward(self, positions_BS: Tensor) -> Tensor:
        return functional.embedding(positions_BS, self.weight)


def rotary_tables(
    positions_BS: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scale: Callable[[Tensor], Tensor] = lambda frequencies: frequencies,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · scale(theta^(−2i / head_dim)), each [B, S, 1, head_dim / 2] (Su et al. 2021,
    arXiv:2104.09864).

    The angles are computed in fp32 whatever `dtype`: at position 4096 bf16 could not tell neighbours apart.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions_BS[:, :, None, None].to(wide) * scale(1.0 / theta**exponents).to(wide)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def llama3_frequencies(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> Tensor:
    """Rotary frequencies [radians per token] for texts longer than `original_positions`, as Llama 3.1 has them.

    Those that turn `high_freq_factor` times or more in the original length tell near places apart and stay; those that
    turn `low_freq_factor` times or less are divided by `factor`; in between, both in proportion.
    """
    turns = original_positions / (2 * math.pi / frequencies)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies
