"""The embedding of a network, as its config describes it.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of
them), D model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from parallel.documents import Documents
from parallel.embedding import ReplicatedEmbedding, VocabParallelEmbedding, sinusoids
from parallel.params import Init
from parallel.rng import Streams
from trainer.model.config import TransformerConfig
from trainer.model.names import names_of
from trainer.model.pieces import Dropout, make_norm


class Embedding(nn.Module):
    """The embedding of tokens [B, S] → [N, D] in the compute format.

    Positions begin again with each document. A document is one text, not a pair of texts, so every
    token has type 0.
    """

    def __init__(self, config: TransformerConfig, tokens: VocabParallelEmbedding, *, site: str, dtype: torch.dtype) -> None:
        """Build the embedding; `site` names the random stream of its dropout."""
        super().__init__()
        names, tp = names_of(config), tokens.tp
        init = Init(std=config.init_std)
        self.dtype = dtype
        # Rounded to the compute format, as the Gemma models were trained: 55.5 instead of √3072 =
        # 55.43 in bf16.
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
        y_ND: Tensor = self.dropout(self.norm(x_ND.to(self.dtype)), documents, streams)
        return y_ND
