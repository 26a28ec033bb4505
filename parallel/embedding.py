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
    """An embedding matrix E, divided by rows of the vocabulary: Y = Σ_i E_i[tokens], where each
    token is in one E_i only.

    Forward: tokens [N] → [N, D], with one all-reduce; with sequence parallelism → this rank's
    tokens of it, with one reduce-scatter. Backward: each rank keeps the gradient of its own rows;
    with sequence parallelism after an all-gather.
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
        """Declare this rank's rows of the weight.

        `tied_over`: the ranks of the first and the last pipeline stage, if the head of the last has
        this weight too. `tied_to`: another embedding whose weight this one uses (source and target
        of a translation share one).
        """
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

    Forward: row numbers [N] → [N, D]. With sequence parallelism the result has this rank's tokens
    only, so the gradient is partial.
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
    """Return sin(p / 10000^(2i / D)) for i < D/2, then the cosines, of each position p: fp64 [N,
    D].

    Vaswani et al. 2017, arXiv:1706.03762, §3.5, where sines and cosines alternate.
    """
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
    """Return the cosine and the sine of position · scale(theta^(−2i / head_dim)), each [B, S, 1,
    head_dim / 2] (Su et al. 2021, arXiv:2104.09864).

    The angles are computed in fp32 whatever `dtype` is: at position 4096 bf16 could not tell
    neighbours apart.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions_BS[:, :, None, None].to(wide) * scale(1.0 / theta**exponents).to(wide)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def llama3_frequencies(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> Tensor:
    """Return rotary frequencies [radians per token] for texts longer than `original_positions`, as
    Llama 3.1 scales them.

    Frequencies that turn at least `high_freq_factor` times within the original length tell near
    positions apart, and stay. Frequencies that turn at most `low_freq_factor` times are divided by
    `factor`. Those in between get a proportional mix of the two.
    """
    turns = original_positions / (2 * math.pi / frequencies)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies
