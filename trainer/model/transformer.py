"""One transformer for all families, built from the layers of `parallel/`.

A model is a list of blocks: the embedding, the layers, the head. A `Stage` is a contiguous part of that list; without
pipeline parallelism it is the whole list. A rank only ever builds its own blocks, one after another, so it never holds
more than one of them whole when ZeRO-3 divides them.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of them), D model,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from parallel.attention import Documents, ParallelAttention, Rotation
from parallel.collectives import all_gather, reduce_from_group
from parallel.cross_attention import ParallelCrossAttention
from parallel.embedding import ReplicatedEmbedding, VocabParallelEmbedding, llama3_frequencies, rotary_tables, sinusoids
from parallel.linear import ReplicatedLinear
from parallel.loss import IGNORE, VocabParallelHead
from parallel.mesh import Group
from parallel.mlp import ACTIVATIONS, ParallelMLP
from parallel.norm import LayerNorm, QueryKeyNorm, RMSNorm
from parallel.params import Init, ShardSpec, complete_partial_gradients, materialise, owned_specs
from parallel.rng import Streams, dropout
from parallel.tensor import TensorParallel
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import RopeScaling, TransformerConfig
from trainer.model.halves import EmbeddedHalves, SourceLayer, TargetHead, TargetLayer
from trainer.model.names import WeightNames, names_of

Source = tuple[Tensor, Documents]  # what the encoder made of the sources [N, D], and where they lie


def logical_specs(config: TransformerConfig) -> list[ShardSpec]:
    """What the parameters of the whole, undivided model are, in the model's order; no storage, shapes only."""
    stage = Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("meta"),
        fill=lambda block: None,
    )
    return [spec for _, _, spec in owned_specs(stage)]


def make_norm(config: TransformerConfig, name: str | None, tp: TensorParallel) -> nn.Module:
    """The family's norm; where its name is None the family has none, and x stays as it is."""
    if name is None:
        return nn.Identity()
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, eps=config.norm_eps, name=name, tp=tp, offset=config.norm_offset)
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias, name=name, tp=tp)


class Dropout(nn.Module):
    """Dropout of [N, D] activations outside the parallel regions; `site` names its random stream."""

    def __init__(self, rate: float, site: str, tp: TensorParallel) -> None:
        super().__init__()
        self.rate = rate
        self.site = site
        self.tp = tp

    def forward(self, x_ND: Tensor, documents: Documents, streams: Streams | None, chosen: Tensor | None = None) -> Tensor:
        """`streams` None: x as it is (evaluation). `chosen`: x has only these of this rank's tokens."""
        if not self.rate or streams is None:
            return x_ND
        rows, seq_len = documents.shape
        tokens = self.tp.tokens(rows * seq_len)
        keeps_ND = streams.keeps_features(self.site, self.rate, (seq_len, x_ND.shape[1]), tokens, x_ND.device)
        return dropout(x_ND, keeps_ND if chosen is None else keeps_ND[chosen], self.rate)


class Embedding(nn.Module):
    """tokens [B, S] → [N, D] in the compute format. Positions begin again with each document; a document is one text, not
    a pair of them, so every token has type 0."""

    def __init__(self, config: TransformerConfig, tokens: VocabParallelEmbedding, *, site: str, dtype: torch.dtype) -> None:
        """`site` names the stream of the dropout."""
        super().__init__()
        names, tp = names_of(config), tokens.tp
        init = Init(std=config.init_std)
        self.dtype = dtype
        # Rounded to the compute format, as the Gemma models were trained: 55.5 instead of √3072 = 55.43 in bf16.
        self.scale = torch.tensor(math.sqrt(config.hidden_size), dtype=dtype, device="cpu").item()
        self.scaled = config.scaled_embedding
        self.tokens = tokens
        tables = ((config.max_positions, names.positions), (config.token_types, names.token_types))
        self.positions, self.token_types = (
            None if name is None else ReplicatedEmbedding(rows, config.hidden_size, name=name, init=init, tp=tp)
            for rows, name in tables
        )
        self.sinusoidal = config.positions == "sinusoidal"
        self.norm = make_norm(config, names.embedding_norm, tp)
        self.dropout = Dropout(config.embedding_dropout, site, tp)

    def forward(self, tokens_BS: Tensor, documents: Documents, streams: Streams | None) -> Tensor:
        x_ND = self.tokens(tokens_BS.flatten())
        if self.scaled:
            x_ND = x_ND.to(self.dtype) * self.scale
        if self.sinusoidal:
            mine = self.tokens.tp.tokens(tokens_BS.numel())
            positions_N = documents.positions_BS.flatten()[mine].to(x_ND.device)
            x_ND = x_ND + sinusoids(positions_N, x_ND.shape[1]).to(x_ND.dtype)
        if self.positions is not None:
            x_ND = x_ND + self.positions(documents.positions_BS.to(tokens_BS.device).flatten())
        if self.token_types is not None:
            x_ND = x_ND + self.token_types(torch.zeros_like(tokens_BS).flatten())
        return self.dropout(self.norm(x_ND.to(self.dtype)), documents, streams)


def make_embedding(
    config: TransformerConfig, *, dtype: torch.dtype, tp: TensorParallel, tied_over: Group | None
) -> Embedding | EmbeddedHalves:
    names, init, D = names_of(config), Init(std=config.init_std), config.hidden_size
    tokens = VocabParallelEmbedding(config.vocab_size, D, name=names.embedding, init=init, tp=tp, tied_over=tied_over)
    embedding = Embedding(config, tokens, site=names.embedding, dtype=dtype)
    if names.encoder is None:
        return embedding
    of_source, name = config.source_vocab_size, names.source_embedding
    if of_source is None or name is None:
        of_source, name, tied_to = config.vocab_size, names.embedding, tokens
    else:
        tied_to = None
    sources = VocabParallelEmbedding(of_source, D, name=name, init=init, tp=tp, tied_to=tied_to)
    return EmbeddedHalves(Embedding(config, sources, site=f"{name}/source", dtype=dtype), embedding)


class CrossAttention(nn.Module):
    """norm(x + attention(norm(x), source)); [N, D] → [N, D]."""

    def __init__(
        self,
        config: TransformerConfig,
        number: int,
        names: WeightNames,
        init: Init,
        out_init: Init,
        norm: Callable[[str | None], nn.Module],
        *,
        recompute_core: bool,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        query, key_value = names.cross_attention(config, number)
        out = names.cross_out.format(layer=number)
        self.norm = norm(names.cross_norm)
        self.attention = ParallelCrossAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            query=query,
            key_value=key_value,
            out=out,
            qkv_bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            transposed=names.transposed,
            dropout=config.attention_dropout,
            scale=config.query_scalar**-0.5,
            init=init,
            out_init=out_init,
            recompute=recompute_core,
            tp=tp,
        )
        self.dropout = Dropout(config.residual_dropout, out, tp)
        self.residual_norm = norm(names.cross_residual_norm)

    def forward(self, x_ND: Tensor, documents: Documents, source: Source, streams: Streams | None) -> Tensor:
        attended = self.attention(self.norm(x_ND), documents, *source, streams)
        return self.residual_norm(x_ND + self.dropout(attended, documents, streams))


class Layer(nn.Module):
    """norm(x + norm(attention(norm(x)))), then norm(x + norm(mlp(norm(x)))); [N, D] → [N, D]. One that writes a target also
    attends to its source in between.

    A family has some of the norms, as its names say: most the innermost (pre), Gemma 2 the two inner ones (sandwich), Bert
    the outermost (post).
    """

    def __init__(
        self, config: TransformerConfig, index: int, *, recompute_core: bool, tp: TensorParallel, kv_copies: Group
    ) -> None:
        super().__init__()
        names, number = names_of(config).of_layer(config, index)
        init = Init(std=config.init_std)
        # 2 residual additions per layer: their sum keeps its variance (Radford et al. 2019, GPT-2, §2.3).
        out_init = Init(std=config.init_std / math.sqrt(2 * config.num_layers)) if config.scaled_residual_init else init
        query, key, value = names.query_key_value(config, number)
        attention_out, mlp_out = names.attention_out.format(layer=number), names.mlp_out.format(layer=number)

        def norm(name: str | None) -> nn.Module:
            return make_norm(config, name and name.format(layer=number), tp)

        self.attention_norm = norm(names.attention_norm)
        self.attention = ParallelAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            query=query,
            key=key,
            value=value,
            out=attention_out,
            qkv_bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            transposed=names.transposed,
            dropout=config.attention_dropout,
            causal=config.causal and index >= config.encoder_layers,
            window=config.windows[index],
            scale=config.query_scalar**-0.5,
            softcap=config.attention_softcap,
            qk_norm=_qk_norm(config, index, tp),
            init=init,
            out_init=out_init,
            recompute=recompute_core,
            share_calls=bool(config.encoder_layers),  # sentences
            tp=tp,
            kv_copies=kv_copies,
        )
        self.attention_post_norm = norm(names.attention_post_norm)
        self.attention_dropout = Dropout(config.residual_dropout, attention_out, tp)
        self.attention_residual_norm = norm(names.attention_residual_norm)
        self.cross = None
        if names.encoder is not None:
            self.cross = CrossAttention(config, number, names, init, out_init, norm, recompute_core=recompute_core, tp=tp)
        self.mlp_norm = norm(names.mlp_norm)
        self.mlp = ParallelMLP(
            hidden_size=config.hidden_size,
            ffn_size=config.ffn_size,
            activation=config.activation,
            inputs=names.mlp_inputs(config, number),
            out=mlp_out,
            bias=config.mlp_bias,
            transposed=names.transposed,
            dropout=config.mlp_dropout,
            init=init,
            out_init=out_init,
            tp=tp,
        )
        self.mlp_post_norm = norm(names.mlp_post_norm)
        self.mlp_dropout = Dropout(config.residual_dropout, mlp_out, tp)
        self.mlp_residual_norm = norm(names.mlp_residual_norm)

    def forward(
        self,
        x_ND: Tensor,
        documents: Documents,
        rotation: Rotation | None,
        streams: Streams | None,
        source: Source | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x_ND), documents, rotation, streams)
        attended = self.attention_dropout(self.attention_post_norm(attended), documents, streams)
        x_ND = self.attention_residual_norm(x_ND + attended)
        if self.cross is not None and source is not None:
            x_ND = self.cross(x_ND, documents, source, streams)
        fed_forward = self.mlp(self.mlp_norm(x_ND), streams)
        fed_forward = self.mlp_dropout(self.mlp_post_norm(fed_forward), documents, streams)
        return self.mlp_residual_norm(x_ND + fed_forward)


def make_layer(
    config: TransformerConfig, index: int, *, recompute_core: bool, tp: TensorParallel, kv_copies: Group
) -> Layer | SourceLayer | TargetLayer:
    layer = Layer(config, index, recompute_core=recompute_core, tp=tp, kv_copies=kv_copies)
    encoder = names_of(config).encoder
    if encoder is None:
        return layer
    if index >= config.encoder_layers:
        return TargetLayer(layer)
    return SourceLayer(layer, make_norm(config, encoder.final_norm if index == config.encoder_layers - 1 else None, tp))


def _qk_norm(config: TransformerConfig, index: int, tp: TensorParallel) -> QueryKeyNorm | None:
    names = names_of(config)
    if names.query_norm is None or names.key_norm is None:
        return None
    query, key = names.query_norm.format(layer=index), names.key_norm.format(layer=index)
    return QueryKeyNorm(config.head_dim, eps=config.norm_eps, query=query, key=key, tp=tp)


class HeadTransform(nn.Module):
    """norm(act(x Aᵀ + b)), [N, D] → [N, D] (Devlin et al. 2018, arXiv:1810.04805, in its code): between the tensor-parallel
    regions, so whole on every rank and of this rank's tokens."""

    def __init__(self, config: TransformerConfig, name: str, norm: str | None, tp: TensorParallel) -> None:
        super().__init__()
        D = config.hidden_size
        self.dense = ReplicatedLinear(D, D, name=name, init=Init(std=config.init_std), tp=tp)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config, norm, tp)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x_ND)))


class Loss(Protocol):
    """What is made of the hidden states before the output layer, [N, D] or this rank's tokens of them."""

    def __call__(
        self,
        output: VocabParallelHead,
        x_ND: Tensor,
        labels_BS: Tensor,
        documents: Documents,
        reference_R: Tensor | None,
        *,
        measured: bool,
    ) -> Tensor:
        """The loss summed over targets, with the statistics of a step behind it where the task's `Measures` has some;
        `measured`, those of an evaluation, float64."""


def next_token_loss(
    output: VocabParallelHead,
    x_ND: Tensor,
    labels_BS: Tensor,
    documents: Documents,
    reference_R: Tensor | None,
    *,
    measured: bool,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of every label; `smoothing`: the share of its weight that is divided evenly over the vocabulary."""
    return output(x_ND, labels_BS.flatten(), measured=measured, smoothing=smoothing)


class Head(nn.Module):
    """Final norm or transform, logits and loss."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        tp: TensorParallel,
        tied_to: VocabParallelEmbedding | None,
        tied_over: Group | None,
        loss: Loss,
    ) -> None:
        super().__init__()
        names = names_of(config)
        self.loss = loss
        self.norm = make_norm(config, names.final_norm, tp)
        self.transform = nn.Identity()
        if names.head_transform is not None:
            self.transform = HeadTransform(config, names.head_transform, names.head_transform_norm, tp)
        self.logits = VocabParallelHead(
            config.vocab_size,
            config.hidden_size,
            name=names.embedding if config.tied_head else names.head,
            init=Init(std=config.init_std),
            tp=tp,
            tied_to=tied_to,
            tied_over=tied_over,
            bias=names.head_bias,
            bias_is_row=names.head_bias_is_row,
            softcap=config.logit_softcap,
        )

    def forward(
        self,
        x_ND: Tensor,
        documents: Documents,
        labels_BS: Tensor | None,
        streams: Streams | None,
        reference_R: Tensor | None = None,
        *,
        measured: bool,
    ) -> Tensor:
        """What the loss gives; without labels this rank's logits [B, S, V/p]."""
        x_ND = self.transform(self.norm(x_ND))
        if labels_BS is not None:
            return self.loss(self.logits, x_ND, labels_BS, documents, reference_R, measured=measured)
        return self.logits(x_ND).unflatten(0, documents.shape)


class ClassHead(nn.Module):
    """Final norm, then logits over classes and their loss, at one token of each document: that with the label.

    As in transformers' …ForSequenceClassification: a decoder's `score` of its last token, Bert's tanh pooler and classifier of
    its first. The head is whole on every rank. With sequence parallelism each rank has the documents whose token it has, so
    that its gradient is partial, and losses are summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, *, tp: TensorParallel) -> None:
        super().__init__()
        names, D, init = names_of(config), config.hidden_size, Init(std=config.init_std)
        self.tp = tp
        self.num_classes = len(config.classes)
        self.norm = make_norm(config, names.final_norm, tp)
        pools = names.pooler is not None
        self.pooler = ReplicatedLinear(D, D, name=names.pooler, init=init, tp=tp) if names.pooler is not None else None
        rate = config.residual_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = Dropout(rate if pools else 0.0, names.classifier, tp)
        self.classifier = ReplicatedLinear(D, self.num_classes, name=names.classifier, init=init, tp=tp, bias=pools)

    def forward(
        self,
        x_ND: Tensor,
        documents: Documents,
        labels_BS: Tensor | None,
        streams: Streams | None,
        reference_R: Tensor | None = None,
        *,
        measured: bool,
    ) -> Tensor:
        """The loss summed over documents; `measured`, that and how many of class i were taken for class j, float64
        [1 + C²]; without labels every token's logits [B, S, C]."""
        x_ND = self.norm(x_ND)
        if labels_BS is None:
            logits_NC = self.classifier(self._pooled(x_ND))
            whole_NC = all_gather(logits_NC, self.tp.group) if self.tp.sequence else logits_NC
            return whole_NC.unflatten(0, documents.shape)
        labels_N = labels_BS.flatten()[self.tp.tokens(labels_BS.numel())]
        chosen = (labels_N != IGNORE).nonzero().squeeze(-1)
        pooled_LD = self.dropout(self._pooled(x_ND[chosen]), documents, streams, chosen)
        logits_LC = self.classifier(pooled_LD)
        wide = torch.promote_types(logits_LC.dtype, torch.float32)
        loss = cross_entropy(logits_LC.to(wide), labels_N[chosen], reduction="sum")
        sums = torch.cat([loss.double()[None], self._confusion(logits_LC, labels_N[chosen])]) if measured else loss
        return reduce_from_group(sums, self.tp.group) if self.tp.sequence else sums

    def _pooled(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.pooler is None else self.pooler(x_ND).tanh()

    def _confusion(self, logits_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Row by row of the true class, float64 [C²]; of equal logits the lowest class counts."""
        pairs_L = labels_L * self.num_classes + logits_LC.argmax(-1)
        return torch.bincount(pairs_L, minlength=self.num_classes**2).double()


class Stage(nn.Module):
    """A contiguous part of the model.

    `adapt` may freeze a block's parameters and put others beside them (tuning); `fill` gives values to them after they were
    materialised (initial or loaded ones); `partition` may divide them over ranks at once (ZeRO-3). Every rank of the tensor
    group must build its stage together.

    A tied head shares the weight of the embedding in this stage, or of `tied_to`, the embedding in another stage on this
    rank; or holds a copy of it, when the first and the last stage are on different ranks: `tied_over` these two. `tied_over`
    is also given, as a group of one, where two stages of one rank share the weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        recompute: Literal["none", "selective", "full"],
        tp: TensorParallel,
        device: torch.device,
        fill: Callable[[nn.Module], None],
        adapt: Callable[[nn.Module], None] = lambda block: None,
        partition: Callable[[nn.Module], None] = lambda block: None,
        tied_to: VocabParallelEmbedding | None = None,
        tied_over: Group | None = None,
        loss: Loss = next_token_loss,
    ) -> None:
        super().__init__()
        self.config = config
        self.loss = loss
        self.dtype = dtype
        self.recompute = recompute
        self.tp = tp
        self.kv_copies = key_value_copies(config.num_kv_heads, tp.group)
        self.tied_over = tied_over if config.ties_head else None
        self.tied_to = (tied_to,)  # in a tuple: a module here would be listed as this one's child
        self.embedding: Embedding | EmbeddedHalves | None
        self.head: Head | ClassHead | TargetHead | None
        self.register_module("embedding", None)  # so that parameters are listed in the order of the model
        self.layers = nn.ModuleDict()
        self.register_module("head", None)
        for block in blocks:
            with torch.device("meta"):
                built = self._build(block)
                adapt(built)
            materialise(built, device)
            fill(built)
            partition(built)
            complete_partial_gradients(built)

    def _build(self, block: Block) -> nn.Module:
        if block.kind == "embedding":
            self.embedding = make_embedding(self.config, dtype=self.dtype, tp=self.tp, tied_over=self.tied_over)
            return self.embedding
        if block.kind == "layer":
            self.layers[str(block.layer)] = make_layer(
                self.config,
                block.layer,
                recompute_core=self.recompute == "selective",
                tp=self.tp,
                kv_copies=self.kv_copies,
            )
            return self.layers[str(block.layer)]
        if self.config.classes:
            self.head = ClassHead(self.config, tp=self.tp)
            return self.head
        embedding = self.embedding.tokens if self.embedding is not None else self.tied_to[0]
        tied_to = embedding if self.config.ties_head else None
        head = Head(self.config, tp=self.tp, tied_to=tied_to, tied_over=self.tied_over, loss=self.loss)
        self.head = TargetHead(head) if self.config.encoder_layers else head
        return self.head

    def forward(
        self,
        x: Tensor,
        documents: Documents,
        labels_BS: Tensor | None = None,
        streams: Streams | None = None,
        reference_R: Tensor | None = None,
        *,
        measured: bool = False,
    ) -> Tensor:
        """First stage: x = tokens [B, S]; others: hidden [N, D], with `halves` of both. Last stage: the loss summed over the
        targets of `labels_BS`, or `measured`, without gradients, the statistics that the task's `Measures` reads, float64, the
        loss first; this rank's logits [B, S, V/p] without labels. Others: hidden. `streams` None: no dropout. `reference_R`:
        what the loss compares the R documents with, where it does."""
        if self.embedding is not None:
            x = self.embedding(x, documents, streams)
        rotation = self._rotation(documents, x.device)
        for layer in self.layers.values():
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(layer, x, documents, rotation, streams, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, documents, rotation, streams)
        if self.head is None:
            return x
        return self.head(x, documents, labels_BS, streams, reference_R=reference_R, measured=measured)

    def _rotation(self, documents: Documents, device: torch.device) -> Rotation | None:
        if self.config.positions != "rope":
            return None
        positions_BS = documents.positions_BS.to(device)
        return rotary_tables(
            positions_BS, self.config.head_dim, self.config.rope_theta, self.dtype, _frequency_scale(self.config.rope_scaling)
        )


def key_value_copies(num_kv_heads: int, group: Group) -> Group:
    """The ranks that hold the same key/value heads as this one: itself alone, unless there are fewer heads than ranks."""
    return Group.alone() if num_kv_heads >= group.size else group.divide(num_kv_heads)


def _frequency_scale(scaling: RopeScaling | None) -> Callable[[Tensor], Tensor]:
    if scaling is None:
        return lambda frequencies: frequencies
    if scaling.kind == "linear":
        return lambda frequencies: frequencies / scaling.factor
    return partial(
        llama3_frequencies,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_positions=scaling.original_positions,
    )
