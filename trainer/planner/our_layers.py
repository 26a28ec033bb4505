"""The work of our own layers on one rank, counted from `trainer/model` and `parallel/`: every
operation on a whole tensor, with the bytes that it reads and writes. No torch.

Shape letters: N tokens of a micro-batch on a rank, D model, H heads, G key/value heads, K head dim,
F ffn, V vocabulary, T tensor degree; i: bytes of a number in the compute format, 4 in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.model.config import TransformerConfig
from trainer.planner.activations import chunk_tokens
from trainer.planner.operations import Attention, Move, Pass, Product, Share, Work

WIDE = 4  # bytes of fp32
# What the host issues beside kernels on whole tensors. A norm and a rotation are functions of ours
# under autograd, a norm with small sums; attention changes views; and a layer has some fifteen
# modules. A chunk of logits has small sums.
CALLS_OF_NORM, CALLS_OF_ROTATION, CALLS_OF_ATTENTION, CALLS_OF_MODULES, CALLS_OF_CHUNK = 8, 4, 12, 8, 12
# The mask of a dropout: a random number is drawn, fp32, and compared; then masked_fill and a
# division. Drawing takes about as long as an activation.
FORWARD, BACKWARD = 2, 5  # products in a kernel of attention


def layer_pass(config: TransformerConfig, share: Share, window: int | None = None, *, crosses: bool = False) -> Pass:
    """Return the work of one layer on a micro-batch. `crosses`: it also attends to a source."""
    parts = [_attention(config, share, window), _mlp(config, share)]
    parts += [_cross(config, share)] * crosses
    norms = {"pre": 2, "post": 2, "sandwich": 4}[config.norm_position] + crosses
    parts += [_norm(config, share)] * norms
    # x + f(x) forward; backward adds the gradients of the two branches.
    added = _fresh(3 * _hidden(config, share))
    dropped = _dropout(config.residual_dropout, share.own_tokens * config.hidden_size, share.itemsize)
    parts += [Pass(added, added, Work()), dropped] * (2 + crosses)
    whole = _together([*parts, Pass(Work(calls=CALLS_OF_MODULES), Work(), Work())])
    return Pass(whole.forward, whole.backward, parts[0].core)


def head_pass(config: TransformerConfig, share: Share) -> Pass:
    """Return the work of the final norm, the logits and the loss.

    All gradients are computed in forward, chunk by chunk (`parallel.loss._CrossEntropySum`);
    backward multiplies them by a number.
    """
    N, D, i = share.tokens, config.hidden_size, share.itemsize
    norm = _norm(config, share) if config.norm_position != "post" else Pass(Work(), Work(), Work())
    if config.classes:
        return norm
    V = -(-config.vocab_size // share.tensor)
    chunks = max(1, -(-N // chunk_tokens(V, D)))
    logits = N * V * WIDE
    part = N / chunks
    products = [Product(round(part), V, D), Product(round(part), D, V)] * chunks
    # fp32: the maximum of the logits; softmax; its maximum; masked. To fp32 and back again in a
    # half format.
    moves = [Move((1 + 2 + 1 + 2) * logits, 4 * chunks, "reused", N * V, "fp32")]
    if i < WIDE:
        moves.append(Move(2 * N * V * (i + WIDE), 2 * chunks, "fresh", 0, "fp32"))
    backward = [Move(2 * N * D * i, 1)]
    if share.trains:
        products += [Product(V, D, round(part))] * chunks
        # The first chunk's gradient of the matrix is kept, and each other's is added.
        moves += [Move(3 * (chunks - 1) * V * D * WIDE, chunks - 1, "reused", 0, "fp32")] * (chunks > 1)
        backward.append(Move(2 * V * D * WIDE, 1, "fresh", 0, "fp32"))
    moves += _casts(share, V * D)
    sums = [N * D * i] * (share.tensor > 1)
    forward = _issued(Work(products, moves, calls=CALLS_OF_CHUNK * chunks))
    return _together([norm, Pass(forward, _issued(Work([], backward, sums)), Work())])


def embedding_pass(config: TransformerConfig, share: Share) -> Pass:
    """Return the work of looking tokens up and of adding their gradients to a table of zeros."""
    N, D = share.tokens, config.hidden_size
    V = -(-config.vocab_size // share.tensor)
    moved = 2 * N * D * share.stored_bytes
    tables = 1 + (config.positions == "learned") + bool(config.token_types)
    forward = [Move(tables * moved, tables), Move((tables - 1) * 1.5 * moved, tables - 1)]
    if share.stored_bytes != share.itemsize:
        forward.append(Move(N * D * (share.stored_bytes + share.itemsize), 1, "fresh", 0, "fp32"))
    backward = []
    if share.trains:
        backward = [Move(V * D * share.stored_bytes, 1), Move(1.5 * tables * moved, tables)]
    sums = [N * D * share.itemsize] * (share.tensor > 1)
    parts = [Pass(_issued(Work([], forward, sums, 4)), _issued(Work([], backward)), Work())]
    parts += [_norm(config, share)] * config.embedding_norm
    parts.append(_dropout(config.embedding_dropout, share.own_tokens * D, share.itemsize))
    if config.positions == "rope":  # cosines and sines of all positions
        angles = N * config.head_dim / 2
        parts.append(Pass(_issued(Work([], [Move(6 * WIDE * angles, 4, "fresh", 2 * angles, "fp32")])), Work(), Work()))
    return _together(parts)


# ------------------------------------------------------------------------ parts of a layer


def _attention(config: TransformerConfig, share: Share, window: int | None) -> Pass:
    N, D, K, i = share.tokens, config.hidden_size, config.head_dim, share.itemsize
    H, G = max(1, config.num_heads // share.tensor), max(1, config.num_kv_heads // share.tensor)
    queries_keys, all_three = N * (H + G) * K * i, N * (H + 2 * G) * K * i
    inputs = _linear(share, D, (H + 2 * G) * K, bias=config.qkv_bias)
    output = _linear(share, H * K, D, bias=config.attention_out_bias, adds_bias=True)
    forward, backward = _kernel(config, share, H, window)
    joined = [Move(2 * queries_keys, 1, "joined")]  # the gradients of queries and keys
    if config.positions == "rope":
        # Each half of the features: a · cos into the output, then − b · sin added there; values are
        # copied beside it. It is as much work backward.
        values = all_three - queries_keys
        turned = Work([], [Move(5 * queries_keys, 4), Move(2 * values, 1)], calls=CALLS_OF_ROTATION)
        forward, backward = turned + forward, turned + backward
    else:
        joined.append(Move(2 * all_three, 1, "joined"))  # and those with the values'
    if config.qk_norm:
        norm = _rms_norm((H + G) * K * N, i)
        inputs = _together([inputs, norm])
    views = Work(calls=CALLS_OF_ATTENTION)
    forward, backward = _issued(forward + views), _issued(backward + Work([], joined) + views)
    # Sums over the tensor ranks: of the output forward, of the input's gradient backward.
    sums = Work(sums=[N * D * i] * (share.tensor > 1))
    core = Pass(forward + sums, backward + sums, forward)
    whole = _together([inputs, output, core])
    return Pass(whole.forward, whole.backward, forward)


def _kernel(config: TransformerConfig, share: Share, heads: int, window: int | None) -> tuple[Work, Work]:
    """Return the kernel between the projections, forward and backward."""
    S, K, batch = share.length, config.head_dim, share.sequences * heads
    beyond = 0 if window is None else max(0, S - window)
    seen = (S * S - beyond * beyond) / (2 if config.causal else 1)  # pairs of tokens
    once = Product(max(1, round(seen / S)), K, S, batch)
    square = 2 * seen * 4 * K * batch
    return tuple(Work(attention=[Attention(once, count, square, S, K)]) for count in (FORWARD, BACKWARD))  # type: ignore[return-value]


def _mlp(config: TransformerConfig, share: Share) -> Pass:
    N, D, F, i = share.tokens, config.hidden_size, config.ffn_size // share.tensor, share.itemsize
    features = N * F * i
    if config.gated_mlp:
        # act(G), which is multiplied by U. Backward: the gradient times U, the activation's, act(G)
        # again, and the gradient times that.
        forward = [Move(2 * features, 1, "fresh", N * F), Move(3 * features, 1, "reused")]
        backward = [Move(6 * features, 2, "fresh", N * F), Move(5 * features, 2, "fresh", N * F)]
    else:
        forward = [Move(2 * features, 1, "fresh", N * F)]
        backward = [Move(3 * features, 1, "fresh", N * F)]
    sums = [N * D * i] * (share.tensor > 1)
    parts = [
        _linear(share, D, F * (2 if config.gated_mlp else 1), bias=config.mlp_bias),
        Pass(_issued(Work([], forward, sums)), _issued(Work([], backward, sums)), Work()),
        _dropout(config.mlp_dropout, N * F, i),
        _linear(share, F, D, bias=config.mlp_bias, adds_bias=True),
    ]
    return _together(parts)


def _cross(config: TransformerConfig, share: Share) -> Pass:
    """Return the work of attention to a source as long as the target."""
    D, K = config.hidden_size, config.head_dim
    H, G = max(1, config.num_heads // share.tensor), max(1, config.num_kv_heads // share.tensor)
    forward, backward = _kernel(config, share, H, None)
    # Every pair of tokens, not half of them.
    kernel = Pass(_issued(forward + forward), _issued(backward + backward), Work())
    sums = Work(sums=[share.tokens * D * share.itemsize] * (share.tensor > 1))
    linear = [_linear(share, D, H * K, bias=config.qkv_bias), _linear(share, D, 2 * G * K, bias=config.qkv_bias)]
    output = _linear(share, H * K, D, bias=config.attention_out_bias, adds_bias=True)
    return _together([*linear, kernel, output, Pass(sums, sums, Work())])


def _linear(share: Share, inputs: int, outputs: int, *, bias: bool, adds_bias: bool = False) -> Pass:
    """Return the work of a linear layer. `adds_bias`: after a sum over ranks, not in the
    product."""
    N, i = share.tokens, share.itemsize
    forward = _casts(share, inputs * outputs)
    backward = []
    products = [Product(N, inputs, outputs)]
    if bias:
        forward.append(Move((2 if adds_bias else 1) * N * outputs * i, 1))
        backward.append(Move(N * outputs * i, 1))
    if share.trains:
        products.append(Product(outputs, inputs, N))
        backward += _casts(share, inputs * outputs)
    return Pass(_issued(Work([Product(N, outputs, inputs)], forward)), _issued(Work(products, backward)), Work())


def _casts(share: Share, elements: int) -> list[Move]:
    """Return the rounding of weights that are kept in fp32, or of their gradients back
    (ZeRO-0)."""
    if share.stored_bytes == share.itemsize:
        return []
    return [Move(elements * (share.stored_bytes + share.itemsize), 1, "fresh", 0, "fp32")]


def _norm(config: TransformerConfig, share: Share) -> Pass:
    elements = share.own_tokens * config.hidden_size
    return _rms_norm(elements, share.itemsize) if config.norm == "rmsnorm" else _layer_norm(elements, share.itemsize)


def _rms_norm(elements: float, i: int) -> Pass:
    """Return the work of `parallel.norm._RMSNorm`. In a half format products with the fp32 scale
    are fp32, and are rounded again."""
    rounded = (i + WIDE) * (i < WIDE)
    # The length; x · scale; n · weight.
    forward = Work([], [Move((i + (i + WIDE) + rounded + 2 * i) * elements, 3 + (i < WIDE))], calls=CALLS_OF_NORM)
    # grad · n and its sum; grad · weight; that · n and its sum; less n times it; times scale.
    passes = (3 + 1 + 2 + 3 + 1 + 3) * i + (i + WIDE) + rounded
    backward = Work([], [Move(passes * elements, 7 + (i < WIDE))], calls=CALLS_OF_NORM)
    return Pass(_issued(forward), _issued(backward), Work())


def _layer_norm(elements: float, i: int) -> Pass:
    """Return the work of torch's fused kernels: backward reads x and the gradient twice."""
    return Pass(_issued(Work([], [Move(2 * i * elements, 1)])), _issued(Work([], [Move(5 * i * elements, 2)])), Work())


def _dropout(rate: float, elements: float, i: int) -> Pass:
    """Return the work of `parallel.rng`: numbers are drawn in fp32 and compared, then inputs masked
    and divided."""
    if not rate:
        return Pass(Work(), Work(), Work())
    drawn = Move((WIDE + WIDE + 1) * elements, 2, "fresh", elements, "fp32")
    forward = Work([], [drawn, Move((4 * i + 2) * elements, 3)])
    return Pass(_issued(forward), _issued(Work([], [Move((4 * i + 1) * elements, 2)])), Work())


# ------------------------------------------------------------------------ how they join


def _hidden(config: TransformerConfig, share: Share) -> float:
    return share.own_tokens * config.hidden_size * share.itemsize


def _fresh(num_bytes: float) -> Work:
    return _issued(Work([], [Move(num_bytes, 1)]))


def _issued(work: Work) -> Work:
    """Return the work with a call of the host for each kernel in it, besides those it has."""
    kernels = len(work.products) + len(work.attention) + sum(move.kernels for move in work.moves)
    return Work(work.products, work.moves, work.sums, work.calls + kernels, work.attention)


def _together(parts: list[Pass]) -> Pass:
    return Pass(*(_sum(works) for works in zip(*parts, strict=True)))


def _sum(works: Iterator[Work] | tuple[Work, ...]) -> Work:
    total = Work()
    for work in works:
        total.products += work.products
        total.moves += work.moves
        total.sums += work.sums
        total.calls += work.calls
        total.attention += work.attention
    return total
