"""The transformer of all families, built from the layers of `parallel/`.

A model is a list of blocks: the embedding, the layers, the head. A `Stage` is a contiguous part of
that list; without pipeline parallelism it is the whole list. A rank only builds its own blocks, one
after another, so it never has more than one of them whole when ZeRO-3 divides them.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of
them), D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.attention import Rotation
from parallel.documents import Documents
from parallel.embedding import VocabParallelEmbedding, llama3_frequencies, rotary_tables
from parallel.mesh import Group
from parallel.params import ShardSpec, complete_partial_gradients, materialise, owned_specs
from parallel.tensor import TensorParallel
from trainer.data.loader import MicroBatch
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import RopeScaling, TransformerConfig
from trainer.model.embedding import Embedding
from trainer.model.encoder_decoder import SourceAndTargetEmbedding, TargetHead
from trainer.model.heads import Head, LabelHead, Objective, Output
from trainer.model.layers import make_embedding, make_layer
from trainer.model.position_tables import PositionTables


def logical_specs(config: TransformerConfig) -> list[ShardSpec]:
    """Return the specs of the parameters of the whole, undivided model, in the model's order.
    Nothing is stored: the model is built on the meta device."""
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


class Stage(nn.Module):
    """A contiguous part of the model.

    `adapt` may freeze a block's parameters and add others beside them (tuning). `fill` gives them
    values after they were materialised (initial or loaded ones). `partition` may divide them over
    ranks at once (ZeRO-3). Every rank of the tensor group must build its stage together.

    A tied head shares the weight of the embedding in this stage, or of `tied_to`, the embedding in
    another stage on this rank. When the first and the last stage are on different ranks it has a
    copy of it, and `tied_over` is the group of these two. `tied_over` is also given, as a group of
    one, where two stages of one rank share the weight. `tables`: the tables of relative positions
    of this rank's stages; None: the rank has this stage only.
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
        tables: PositionTables | None = None,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or Objective()
        self.dtype = dtype
        self.recompute = recompute
        self.tp = tp
        self.kv_copies = key_value_copies(config.num_kv_heads, tp.group)
        self.tied_over = tied_over if config.ties_head else None
        # in a tuple, because a module here would be listed as a child of this one
        self.tied_to = (tied_to,)
        self.tables = PositionTables() if tables is None else tables
        self.embedding: Embedding | SourceAndTargetEmbedding | None
        self.head: Head | LabelHead | TargetHead | None
        # so that parameters are listed in the order of the model
        self.register_module("embedding", None)
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
                tables=self.tables,
            )
            return self.layers[str(block.layer)]
        if self.config.classes:
            self.head = LabelHead(self.config, tp=self.tp, objective=self.objective.of_labels)
            return self.head
        embedding = self.embedding.tokens if self.embedding is not None else self.tied_to[0]
        tied_to = embedding if self.config.ties_head else None
        head = Head(self.config, tp=self.tp, tied_to=tied_to, tied_over=self.tied_over, objective=self.objective.of_tokens)
        self.head = TargetHead(head) if self.config.encoder_layers else head
        return self.head

    # tensors that are saved like weights and never trained: there are none
    constants: Sequence[tuple[ShardSpec, Tensor]] = ()

    def require_causal(self, device: torch.device) -> None:
        """Do nothing: the config says which tokens a token attends to."""

    def settle_lengths(self, device: torch.device, seq_len: int, *, may_call_apart: bool) -> list[str]:
        """Return no remarks: documents do not depend on one another."""
        return []

    def forward(self, x: Tensor, *, batch: MicroBatch, output: Output = "loss") -> Tensor:
        """Return the hidden states [N, D], for both sides of a translation; on the last stage
        `output`: see `Outputs`.

        `x`: tokens [B, S] on the first stage, hidden states on the others. All outputs are computed
        by `forward`, because ZeRO-3 gathers weights where the module itself is called.
        """
        documents, streams = batch.documents, batch.streams
        if self.embedding is not None:
            x = self.embedding(x, documents, streams)
        rotation = self._rotation(documents, x.device)
        for layer in self.layers.values():
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(layer, x, documents, rotation, streams, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, documents, rotation, streams)
        return x if self.head is None else getattr(self.head, output)(x, batch)

    def _rotation(self, documents: Documents, device: torch.device) -> Rotation | None:
        if self.config.positions != "rope":
            return None
        positions_BS = documents.positions_BS.to(device)
        return rotary_tables(
            positions_BS, self.config.head_dim, self.config.rope_theta, self.dtype, _frequency_scale(self.config.rope_scaling)
        )


def key_value_copies(num_kv_heads: int, group: Group) -> Group:
    """Return the ranks that have the same key/value heads as this one: itself alone, unless there
    are fewer heads than ranks."""
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
