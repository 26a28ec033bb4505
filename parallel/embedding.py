"""Embeddings of tokens, positions and token types (Shoeybi et al. 2019, arXiv:1909.08053, §3).

Shape letters: B batch, S sequence, N = B · S tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, whole
from parallel.tensor import TensorParallel
from parallel.vocabulary import VocabularyMatrix, vocabulary_shard


class VocabParallelEmbedding(VocabularyMatrix):
    """Rows of the embedding matrix E divided over the vocabulary: Y = Σ_i E_i[tokens], a token being in one E_i only.

    Forward: tokens [N] → [N, D], or with sequence parallelism this rank's tokens of it; one all-reduce or reduce-scatter.
    Backward: each rank keeps its rows' gradient; with sequence parallelism after an all-gather.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        name: str,
        init: Init,
        tp: TensorParallel,
        tied_over: Group | None = None,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        """`tied_over`: the ranks of the first and the last pipeline stage, when the head there has this weight too. `tied_to`:
        another text's embedding, whose weight is this one's."""
        super().__init__(tp)
        self.first = vocabulary_shard(vocab_size, tp.group)[0]
        if tied_to is not None:
            self.borrow("weight", tied_to)
            return
        self.declare_weight(name, vocab_size, hidden_size, Role.EMBEDDING, init, tied_over)

    def forward(self, tokens_N: Tensor) -> Tensor:
        if self.tp.group.size == 1:
            return self.rows_of(tokens_N)
        local_N = tokens_N - self.first
        elsewhere_N = (local_N < 0) | (local_N >= self.weight.shape[0])
        y_ND = self.rows_of(local_N.masked_fill(elsewhere_N, 0))
        return self.tp.leave(y_ND.masked_fill(elsewhere_N.unsqueeze(-1), 0.0))


class ReplicatedEmbedding(Sharded):
    """A table [rows, D] that is whole on every rank: learned positions, token types.

    Forward: rows of the table [N] → [N, D]; with sequence parallelism of this rank's tokens, so its gradient is partial.
    """

    weight: nn.Parameter

    def __init__(self, rows: int, hidden_size: int, *, name: str, init: Init, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        shape = (rows, hidden_size)
        spec = whole(name, shape, role=Role.EMBEDDING, init=init, copies=tp.group, partial=tp.sequence)
        self.declare("weight", shape, spec)

    def forward(self, rows_N: Tensor) -> Tensor:
        return functional.embedding(rows_N[self.tp.tokens(rows_N.shape[0])], self.weight)


def sinusoids(positions_N: Tensor, hidden_size: int) -> Tensor:
    """Of each position p sin(p / 10000^(2i / D)) for i < D/2, then the cosines, fp64 [N, D] (Vaswani et al. 2017,
    arXiv:1706.03762, §3.5; there the two alternate)."""
    exponents = torch.arange(0, hidden_size, 2, dtype=torch.float64, device=positions_N.device) / hidden_size
    angles = positions_N.unsqueeze(-1) / 10_000.0**exponents
    return torch.cat([angles.sin(), angles.cos()[:, : hidden_size // 2]], dim=-1)


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
