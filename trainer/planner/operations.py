"""The work of a model's blocks on one rank, as operations with their sizes: what a device
multiplies, what it moves, what it sends. No torch.

Shape letters: N tokens of a micro-batch on a rank, D model, H heads, G key/value heads, K head dim,
F ffn, V vocabulary, T tensor degree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.model.config import TransformerConfig


class Product(NamedTuple):
    """Matrix products [rows, inner] · [inner, columns], `times` of them."""

    rows: int
    columns: int
    inner: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.inner * self.times


class Move(NamedTuple):
    """`kernels` that read and write `num_bytes` in all, and multiply next to nothing.

    On CPUs it matters what else they do. `kind`: they make a tensor ("fresh"), change one that is
    there ("reused"), or lay parts of heads side by side ("joined"). `functions`: evaluations of an
    activation in all. `dtype`: the format, if it is not that of the job.
    """

    num_bytes: float
    kernels: float
    kind: str = "fresh"
    functions: float = 0.0
    dtype: str = ""


class Attention(NamedTuple):
    """A fused kernel of attention: `number` products like `product` (2 forward, 5 backward).
    `square_flops`: of the two products of forward over whole squares of a causal mask."""

    product: Product
    number: int
    square_flops: float
    length: int
    head_dim: int


@dataclass
class Work:
    """Operations that run one after another. `calls`: how many the host issues for them;
    `sums`: bytes of the tensors that the tensor-parallel ranks sum up."""

    products: list[Product] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    calls: float = 0
    attention: list[Attention] = field(default_factory=list)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.moves + other.moves,
            self.sums + other.sums,
            self.calls + other.calls,
            self.attention + other.attention,
        )

    @property
    def flops(self) -> int:
        in_kernels = sum(one.number * one.product.flops for one in self.attention)
        return in_kernels + sum(product.flops for product in self.products)

    @property
    def num_bytes(self) -> float:
        return sum(move.num_bytes for move in self.moves)


class Pass(NamedTuple):
    """The work of a block forward and backward; `core`: the part of the forward that selective
    recomputation repeats."""

    forward: Work
    backward: Work
    core: Work


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels with which a program computes a layer.

    `scores_written`: attention writes the scores of all pairs of tokens, where a fused kernel keeps
    them on the chip (Dao et al. 2022, arXiv:2205.14135). `hidden_passes`, `ffn_passes`: reads and
    writes of a feature of the hidden size, or of the ffn size, forward; backward has twice as many.
    `head_passes`: those of a logit.
    `calls`: operations that the host issues for a layer, forward and backward.
    """

    scores_written: bool
    dropout: bool
    hidden_passes: float
    ffn_passes: float
    head_passes: float
    calls: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of a layer that one rank computes: of `sequences` sequences of `length` tokens, with
    `itemsize` bytes a number and gradients of `gradient_bytes`.

    Our own layers have no `kernels`; for them `stored_bytes` are those of a weight's number, which
    is rounded where it is used, and `trains` says whether the weights have gradients.
    """

    sequences: int
    length: int
    tensor: int
    divides_tokens: bool
    itemsize: int
    gradient_bytes: int
    kernels: Kernels | None
    stored_bytes: int = 0
    trains: bool = True

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def own_tokens(self) -> float:
        """The tokens of which this rank keeps hidden states."""
        return self.tokens / (self.tensor if self.divides_tokens else 1)


def counted_layer(config: TransformerConfig, share: Share, window: int | None = None) -> Pass:
    """Return the work of one layer on a micro-batch, by counts of a program's kernels."""
    assert share.kernels is not None
    N, D, K, T = share.tokens, config.hidden_size, config.head_dim, share.tensor
    H, G, F = max(1, config.num_heads // T), max(1, config.num_kv_heads // T), config.ffn_size // T
    size, kernels = share.itemsize, share.kernels
    linear = [
        Product(N, (H + 2 * G) * K, D),
        Product(N, D, H * K),
        Product(N, F * (2 if config.gated_mlp else 1), D),
        Product(N, D, F),
    ]
    moves = [
        Move(kernels.hidden_passes * share.own_tokens * D * size, 4),
        Move(kernels.ffn_passes * N * F * size, 1),
        Move(2 * N * (H + 2 * G) * K * size, 2),
    ]
    core, core_backward = _attention(config, share, H, window)
    sums = [N * D * size] * (2 if T > 1 else 0)
    forward = Work(linear, moves, sums, kernels.calls[0]) + core
    gradients = [
        product
        for rows, columns, inner, _ in linear
        for product in (Product(rows, inner, columns), Product(columns, inner, rows))
    ]
    weights = sum(product.columns * product.inner for product in linear)
    accumulated = Move(2 * share.gradient_bytes * weights, 4)
    doubled = [Move(2 * move.num_bytes, 2 * move.kernels) for move in moves]
    backward = Work(gradients, [*doubled, accumulated], sums, kernels.calls[1]) + core_backward
    return Pass(forward, backward, core)


def _attention(config: TransformerConfig, share: Share, heads: int, window: int | None) -> tuple[Work, Work]:
    """Return the work between the projections, forward and backward."""
    assert share.kernels is not None
    S, K, batch, size = share.length, config.head_dim, share.sequences * heads, share.itemsize
    if share.kernels.scores_written:
        scores = batch * S * S * size
        forward = Work(
            [Product(S, S, K, batch), Product(S, K, S, batch)],
            [Move((2 + 2.5 * share.kernels.dropout) * scores, 1 + share.kernels.dropout)],
        )
        backward = Work(
            [Product(S, S, K, 2 * batch), Product(S, K, S, 2 * batch)],
            [Move((3 + 2.5 * share.kernels.dropout) * scores, 1 + share.kernels.dropout)],
        )
        return forward, backward
    beyond = 0 if window is None else max(0, S - window)
    seen = (S * S - beyond * beyond) // (2 if config.causal else 1)  # pairs of tokens
    once = Product(max(1, seen // S), K, S, batch)
    # Backward computes the scores again: five products for the two of forward.
    kernels = [Attention(once, number, 2 * once.flops, S, K) for number in (2, 5)]
    return Work(attention=kernels[:1]), Work(attention=kernels[1:])


def counted_head(config: TransformerConfig, share: Share) -> Pass:
    """Return the work of the logits, the loss and its gradient."""
    assert share.kernels is not None
    N, D, V = share.tokens, config.hidden_size, -(-config.vocab_size // share.tensor)
    logits = share.kernels.head_passes * N * V * share.itemsize
    forward = Work([Product(N, V, D)], [Move(logits, 4)], calls=20)
    backward = Work([Product(N, D, V), Product(V, D, N)], [Move(logits, 4)], calls=20)
    return Pass(forward, backward, Work())


def counted_embedding(config: TransformerConfig, share: Share) -> Pass:
    """Return the work of looking tokens up and of adding their gradients."""
    looked_up = Move(2 * share.tokens * config.hidden_size * share.itemsize, 2)
    return Pass(Work([], [looked_up], calls=10), Work([], [looked_up, looked_up], calls=10), Work())


def total(works: Iterable[Work]) -> Work:
    return sum(works, Work())
