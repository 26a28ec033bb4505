"""The tensors that a micro-batch keeps for its backward, by kind, for each block of the model. No
torch.

Counted are what autograd saves of our own layers (`parallel/`, `trainer/model/`), and what a
recomputed part keeps as its inputs: each storage once, views of it not again, and no weights. So a
fused projection stays whole as long as its values are needed, and what two operations save counts
once.

Shape letters: N tokens of a micro-batch, of which a rank keeps n between the parallel regions; D
model, H heads, G key/value heads, K head dim, F ffn, V vocabulary; H, G, F and V of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from trainer.model.blocks import Block
from trainer.model.config import TransformerConfig
from trainer.model.names import WeightNames, names_of
from trainer.tuning.targets import modules_by_role

Recompute = Literal["none", "selective", "full"]
NORMS, INPUTS, ATTENTION, MLP = "norms", "inputs of matrices", "attention", "mlp"
MASKS, CASTS, TABLES, LOSS = "dropout masks", "weights in the compute format", "rotary tables", "loss"
EMBEDDING, LAYER_INPUTS = "embedding", "inputs of layers"
FP32_BYTES, INDEX_BYTES, BOOL_BYTES = 4, 8, 1
# As parallel.attention and parallel.loss have them, which need torch.
QUERY_BLOCK, CHUNK_BYTES, TOKENS_PER_FEATURE = 512, 32 << 20, 1


def chunk_tokens(rows: int, hidden_size: int) -> int:
    """Return how many tokens' logits a head with so many rows holds at a time."""
    return max(1, CHUNK_BYTES // (FP32_BYTES * rows), TOKENS_PER_FEATURE * hidden_size)


class Rows(NamedTuple):
    """The rows of a micro-batch, each with documents of these lengths [tokens]."""

    number: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.number * sum(self.lengths)

    @property
    def side(self) -> Rows:
        """The sources of rows that hold sources and then their targets, which are as long."""
        middle, cut = sum(self.lengths) // 2, 0
        while sum(self.lengths[:cut]) < middle:
            cut += 1
        return Rows(self.number, self.lengths[:cut])


@dataclass(frozen=True)
class Beside:
    """The things that tuning puts beside projections: the roles of those whose inputs and those
    whose outputs are kept, their inner features, and the dropout on their inputs."""

    inputs: frozenset[str]
    outputs: frozenset[str]
    features: int
    dropout: float


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The way a rank computes a micro-batch.

    `casts`: weights are held wider than the compute format and converted where they are used.
    `by_token`: the loss needs that of each token, as those of pairs do. `beside`: what tuning
    trains beside frozen weights; None: the model's own weights are trained.
    """

    network: TransformerConfig
    rows: Rows
    tensor: int
    divides_tokens: bool
    itemsize: int
    recompute: Recompute
    casts: bool = False
    by_token: bool = False
    beside: Beside | None = None

    # ------------------------------------------------------------------------ sizes

    @property
    def _own(self) -> int:
        tokens = self.rows.tokens
        return tokens // self.tensor if self.divides_tokens else tokens

    @property
    def _hidden(self) -> int:
        """The bytes of hidden states that this rank has between the regions."""
        return self._own * self.network.hidden_size * self.itemsize

    @property
    def _heads(self) -> int:
        return self.network.num_heads // self.tensor

    @property
    def _kv_heads(self) -> int:
        return max(1, self.network.num_kv_heads // self.tensor)

    def _features(self, width: int) -> int:
        """Return the bytes of so many features of every token, inside a region."""
        return self.rows.tokens * width * self.itemsize

    # ------------------------------------------------------------------------ blocks

    def of_blocks(self, blocks: Sequence[Block]) -> Counter[str]:
        """Return the bytes by kind that a stage with these blocks keeps of a micro-batch."""
        kept: Counter[str] = Counter()
        if self.network.positions == "rope":
            kept[TABLES] += self._features(self.network.head_dim)
        of_layer: dict[tuple[object, ...], Counter[str]] = {}
        if self.network.encoder_layers:
            return self._of_sides(blocks)
        for block in blocks:
            match block.kind:
                case "embedding":
                    kept.update(self.of_embedding())
                case "layer":
                    key = self._key(block.layer)
                    if key not in of_layer:
                        of_layer[key] = self.of_layer(block.layer)
                    kept.update(of_layer[key])
                    if self.beside is not None and block.layer == 0 and self.recompute != "full":
                        # nothing before it is trained
                        kept.subtract(self._norm(names_of(self.network).attention_norm, self._hidden))
                case "head":
                    kept.update(self.of_head())
        return kept

    def _of_sides(self, blocks: Sequence[Block]) -> Counter[str]:
        """Return what blocks of a translation keep, each of which works on one side of the rows.

        Both sides pass through every layer as one tensor, of which a view is enough to keep it.
        """
        side, kept = self._at_work, Counter[str]()
        for block in blocks:
            match block.kind:
                case "embedding":
                    kept.update({kind: 2 * num_bytes for kind, num_bytes in side.of_embedding().items()})
                case "layer":
                    kept.update(side.of_layer(block.layer))
                    reads_source = block.layer >= self.network.encoder_layers
                    if self.recompute == "full":
                        kept[LAYER_INPUTS] += side._hidden  # the other side
                    elif self.network.norm == "layernorm" or reads_source:
                        kept[INPUTS] += (2 if self.network.norm == "rmsnorm" else 1) * side._hidden
                    if reads_source and self.recompute != "full":
                        kept.update(side._cross_attention())
                case "head":
                    kept.update(side.of_head())
        return kept

    def _cross_attention(self) -> Counter[str]:
        """Return what a target's attention to its source keeps, beside the source itself."""
        network, K = self.network, self.network.head_dim
        names = names_of(network)
        kept = self._norm(names.cross_norm, self._hidden)
        kept.update(self._norm(names.cross_residual_norm, self._hidden))
        kept[INPUTS] += self._hidden + self._features(self._heads * K)
        kept[ATTENTION] += self._features((self._heads + 2 * self._kv_heads) * K)
        kept[MASKS] += self._mask(network.residual_dropout)
        if self.recompute == "none" and not self._written_out:
            kept[ATTENTION] += FP32_BYTES * self.rows.tokens * self._heads
            kept[ATTENTION] += self._features(self._heads * K) * (len(self.rows.lengths) > 1)
        return kept

    def while_recomputed(self, blocks: Sequence[Block]) -> int:
        """Return the most bytes that a part has for its backward while it is computed again."""
        layers = [block.layer for block in blocks if block.kind == "layer"]
        if self.recompute == "none" or not layers:
            return 0
        again, now = replace(self._at_work, recompute="none"), self._at_work
        return max(again.of_layer(index).total() - now.of_layer(index).total() for index in set(layers[:2]))

    @property
    def _at_work(self) -> Saving:
        """The tokens that a layer computes at a time: of a translation, one side."""
        return replace(self, rows=self.rows.side) if self.network.encoder_layers else self

    def temporaries(self, blocks: Sequence[Block]) -> int:
        """Return the bytes that are there for a moment: the logits of a chunk of tokens with their
        gradients, or the gradients of a layer's MLP, whichever are more."""
        network, now = self.network, self._at_work
        of_mlp = now._hidden + now._features(network.ffn_size // self.tensor)
        if network.classes or all(block.kind != "head" for block in blocks):
            return of_mlp
        rows = -(-network.vocab_size // self.tensor)
        tokens = min(now.rows.tokens, chunk_tokens(rows, network.hidden_size))
        logits = tokens * rows * (FP32_BYTES + 2 * self.itemsize)
        return max(of_mlp, logits + 3 * now._features(network.hidden_size) + self._head_gradients() * self.by_token)

    def passed_on(self, *, first: bool, last: bool) -> int:
        """Return the bytes that the runtime of a pipeline keeps of a micro-batch beside these: what
        a stage was given, unless its first norm keeps it, and what it gave to the next."""
        keeps_input = self.recompute == "full" or self.network.norm == "layernorm"
        return self._hidden * ((not first and not keeps_input) + (not last))

    def deferred(self, blocks: Sequence[Block]) -> int:
        """Return the bytes that wait for the gradients of weights, where these are computed later:
        the inputs of a layer's matrices and the gradients of their outputs."""
        network, hidden = self.network, self.network.hidden_size
        F, K = network.ffn_size // self.tensor, network.head_dim
        inputs = 2 * self._hidden + self._features(self._heads * K + F)
        outputs = (self._heads + 2 * self._kv_heads) * K + F * (2 if network.gated_mlp else 1) + 2 * hidden
        return (inputs + self._features(outputs)) * sum(block.kind == "layer" for block in blocks)

    def _key(self, index: int) -> tuple[object, ...]:
        return self.network.windows[index], index < self.network.encoder_layers

    def of_embedding(self) -> Counter[str]:
        network, names = self.network, names_of(self.network)
        tokens = self.rows.tokens
        kept = Counter({EMBEDDING: tokens * (INDEX_BYTES + BOOL_BYTES) * (self.tensor > 1)})
        kept[EMBEDDING] += tokens * INDEX_BYTES * ((names.positions is not None) + (names.token_types is not None))
        kept.update(self._norm(names.embedding_norm, self._hidden))
        kept[MASKS] += self._mask(network.embedding_dropout)
        return kept

    def of_layer(self, index: int) -> Counter[str]:
        """Return what a layer keeps: with full recomputation nothing but its input."""
        if self.recompute == "full":
            return Counter({LAYER_INPUTS: self._hidden})
        network = self.network
        names, _ = names_of(network).of_layer(network, index)
        kept: Counter[str] = Counter()
        for part in (
            self._norm(names.attention_norm, self._hidden),
            self._attention(index, names),
            self._norm(names.attention_post_norm, self._hidden),
            self._norm(names.attention_residual_norm, self._hidden),
            self._norm(names.mlp_norm, self._hidden),
            self._mlp(),
            self._norm(names.mlp_post_norm, self._hidden),
            self._norm(names.mlp_residual_norm, self._hidden),
        ):
            kept.update(part)
        kept[MASKS] += 2 * self._mask(network.residual_dropout)
        kept[CASTS] += self._casts()
        return kept

    def of_head(self) -> Counter[str]:
        """Return what the head keeps. The loss has its gradients already, of the hidden states and
        of its weight; losses of tokens keep the hidden states, and a number or two each."""
        network, names = self.network, names_of(self.network)
        kept = self._norm(names.final_norm, self._hidden)
        kept[MASKS] += self._mask(network.final_dropout)
        if network.classes:
            return kept
        if names.head_transform is not None:
            kept[INPUTS] += self._hidden
            kept[LOSS] += self._hidden
            kept.update(self._norm(names.head_transform_norm, self._hidden))
        kept[LOSS] += self._features(network.hidden_size)
        kept[LOSS] += 2 * FP32_BYTES * self.rows.tokens if self.by_token else self._head_gradients()
        return kept

    def _head_gradients(self) -> int:
        """Return the bytes of the gradients of the head's weight and bias, which are summed in
        fp32."""
        rows = -(-self.network.vocab_size // self.tensor)
        has_bias = names_of(self.network).head_bias is not None
        return FP32_BYTES * rows * (self.network.hidden_size + has_bias) * (self.beside is None)

    # ------------------------------------------------------------------------ parts of a layer

    def _norm(self, name: str | None, hidden: int) -> Counter[str]:
        """Return what a norm keeps: its input, or with RMSNorm the normalised one, and a number or
        two for each token."""
        if name is None:
            return Counter()
        numbers = 1 if self.network.norm == "rmsnorm" else 2
        return Counter({NORMS: hidden + numbers * FP32_BYTES * self._own})

    def _mask(self, rate: float) -> int:
        return self._own * self.network.hidden_size * BOOL_BYTES if rate else 0

    def _input(self, num_bytes: int, *roles: str) -> int:
        """Return the bytes of the input of these projections, which is kept for the gradients of
        what is trained there; where it is dropped, each module keeps what it sees, and the mask."""
        if self.beside is None:
            return num_bytes
        modules = modules_by_role(self.network, 0)
        adapted = {modules[role] for role in roles if role in modules and role in self.beside.inputs}
        inner = self._features(self.beside.features) * len(adapted)
        if self.beside.dropout:
            return inner + (num_bytes + num_bytes // self.itemsize * BOOL_BYTES) * len(adapted)
        return inner + num_bytes * bool(adapted)

    def _output(self, num_bytes: int, *roles: str) -> int:
        """Return the bytes of the output of these projections, where something beside them is
        multiplied with it, and what such a thing keeps inside."""
        if self.beside is None or self.beside.outputs.isdisjoint(roles):
            return 0
        inside = 2 * self.beside.features * (not self.beside.inputs)
        return num_bytes + self._own * inside * self.itemsize

    def _attention(self, index: int, names: WeightNames) -> Counter[str]:
        network, N, K = self.network, self.rows.tokens, self.network.head_dim
        H, G = self._heads, self._kv_heads
        core = self._core(index)
        # queries, keys and values as they are projected, or rotated, which are tensors of their own
        kept = Counter({INPUTS: self._input(self._hidden, *"qkv"), ATTENTION: self._features((H + 2 * G) * K)})
        if network.qk_norm:
            weights = (H + G) * K * (FP32_BYTES if self.casts else self.itemsize)
            kept[NORMS] += self._features((H + G) * K) + FP32_BYTES * N * (H + G) + weights
        # What is computed again block by block keeps its inputs also where all is computed again.
        keeps_core = self.recompute == "none" or self._written_out
        kept[ATTENTION] += self._features((H + G) * K) * network.qk_norm
        kept[ATTENTION] += core * keeps_core
        kept[INPUTS] += self._output(self._features((H + 2 * G) * K), *"qkv") + self._output(self._hidden, "o")
        # the result, which attention itself keeps too, unless it is computed again
        result = self._features(H * K)
        fused = result * (self.recompute == "none" and not self._written_out)
        dropped = self.beside is not None and self.beside.dropout
        kept[INPUTS] += self._input(result, "o") + fused if dropped else max(self._input(result, "o"), fused)
        return kept

    def _core(self, index: int) -> int:
        """Return the bytes that softmax(Q Kᵀ) V keeps beside queries, keys and values."""
        network, H = self.network, self._heads
        window = network.windows[index]
        masked = [length for length in self.rows.lengths if window is not None and window < length]
        if self._written_out:
            return BOOL_BYTES * sum(_pairs(length, True, window) for length in self.rows.lengths) * network.causal
        kept = FP32_BYTES * self.rows.tokens * H  # the logarithm of each softmax's sum
        if len(self.rows.lengths) > 1 or masked or network.relative_buckets:
            # each part's result, which is copied into the whole
            kept += self._features(H * network.head_dim)
        biased = self.rows.lengths if network.relative_buckets else masked
        pairs = sum(_pairs(length, network.causal, window) for length in biased)
        return kept + pairs * self.itemsize * (H if network.relative_buckets else 1)

    @property
    def _written_out(self) -> bool:
        """Return whether attention is computed block by block, and each block again in backward,
        because no fused kernel does all that is done to its logits and weights."""
        return self.network.attention_softcap is not None or bool(self.network.attention_dropout)

    def _mlp(self) -> Counter[str]:
        network, F = self.network, self.network.ffn_size // self.tensor
        keeps_result = network.activation == "relu"
        width = F * (2 if network.gated_mlp else 1)
        before = 0 if keeps_result and not network.gated_mlp else width
        after = F if not network.gated_mlp and keeps_result and network.mlp_dropout else 0
        kept = Counter({MLP: self._features(before + after), INPUTS: self._input(self._hidden, "gate", "up")})
        kept[INPUTS] += self._input(self._features(F), "down") + self._output(self._hidden, "down")
        kept[INPUTS] += self._output(self._features(width), "gate", "up")
        kept[MASKS] += self.rows.tokens * F * BOOL_BYTES if network.mlp_dropout else 0
        return kept

    def _casts(self) -> int:
        """Return the bytes of a layer's weights in the compute format, if they are held wider."""
        if not self.casts:
            return 0
        network, D, K = self.network, self.network.hidden_size, self.network.head_dim
        F = network.ffn_size // self.tensor
        rows = D * (self._heads * K + F)
        columns = D * ((self._heads + 2 * self._kv_heads) * K + F * (2 if network.gated_mlp else 1))
        return self.itemsize * (rows + (columns if self.tensor == 1 else 0))


def _pairs(length: int, causal: bool, window: int | None) -> int:
    """Return the elements of the masks of a document's blocks of queries."""
    found = 0
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        found += (end - start) * ((end if causal else length) - first)
    return found
