"""The blocks of an encoder-decoder: each works on the source or on the target side of a row.

A row has sources in its first half and their targets in the second. Between the blocks the hidden
states of both are concatenated, [2N, D]. So every stage of a pipeline passes on the same shape, and
the encoder's output travels beside the target through the stages that need it. With sequence
parallelism each side is divided over the tensor ranks separately.

Shape letters: B batch, S tokens of one side of a row, N = B · S (with sequence parallelism this
rank's share of them), D model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from parallel.attention import Rotation
from parallel.documents import Documents
from parallel.embedding import VocabParallelEmbedding
from parallel.rng import Streams
from trainer.data.loader import MicroBatch
from trainer.model.embedding import Embedding
from trainer.model.heads import Head


class SourceAndTargetEmbedding(nn.Module):
    """The embeddings of both sides, tokens [B, 2S] → [2N, D]."""

    def __init__(self, source: Embedding, target: Embedding) -> None:
        super().__init__()
        self.target = target  # first, because it has the weight that both may share
        self.source = source

    @property
    def tokens(self) -> VocabParallelEmbedding:
        """The embedding that a tied head shares."""
        return self.target.tokens

    def forward(self, tokens_BS: Tensor, documents: Documents, streams: Streams | None) -> Tensor:
        halves = zip((self.source, self.target), tokens_BS.chunk(2, dim=1), documents.sides, strict=True)
        return torch.cat([embedding(tokens, of_half, streams) for embedding, tokens, of_half in halves])


class SourceLayer(nn.Module):
    """A layer of the encoder, the last one followed by the norm and the dropout. The target is
    passed on unchanged."""

    def __init__(self, layer: nn.Module, final: nn.Module, dropout: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.final = final
        self.dropout = dropout

    def forward(self, x_ND: Tensor, documents: Documents, rotation: Rotation | None, streams: Streams | None) -> Tensor:
        source_ND, target_ND = x_ND.chunk(2)
        source_ND = self.final(self.layer(source_ND, documents.sides[0], rotation, streams))
        if self.dropout is not None:
            source_ND = self.dropout(source_ND, documents.sides[0], streams)
        return torch.cat([source_ND, target_ND])


class TargetLayer(nn.Module):
    """A layer of the decoder, which attends to the source. The source is passed on unchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_ND: Tensor, documents: Documents, rotation: Rotation | None, streams: Streams | None) -> Tensor:
        source_ND, target_ND = x_ND.chunk(2)
        sources, targets = documents.sides
        return torch.cat([source_ND, self.layer(target_ND, targets, rotation, streams, (source_ND, sources))])


class TargetHead(nn.Module):
    """The head on the target, whose labels are the second half of a row's. Its logits are [B, S,
    V/p]."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def loss(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.head.loss(*self._target(x_ND, batch))

    def sums(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.head.sums(*self._target(x_ND, batch))

    def scores(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.head.scores(*self._target(x_ND, batch))

    def logits(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.head.logits(*self._target(x_ND, batch))

    def _target(self, x_ND: Tensor, batch: MicroBatch) -> tuple[Tensor, MicroBatch]:
        labels_BS = None if batch.labels_BS is None else batch.labels_BS.chunk(2, dim=1)[1]
        documents = batch.documents.sides[1]
        row_tokens = documents.shape[1]
        # in the flattened second halves, there are so many halves less before a place
        places_L = None if batch.places_L is None else batch.places_L - (batch.places_L // (2 * row_tokens) + 1) * row_tokens
        return x_ND.chunk(2)[1], replace(batch, labels_BS=labels_BS, documents=documents, places_L=places_L)
