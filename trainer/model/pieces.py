"""The norm, the dropout and the initial matrices of a network, as its config describes them.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of
them), D model.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from parallel.documents import Documents
from parallel.norm import LayerNorm, RMSNorm
from parallel.params import Init
from parallel.rng import Streams, dropout
from parallel.tensor import TensorParallel
from trainer.model.config import TransformerConfig
from trainer.model.names import WeightNames


def make_norm(config: TransformerConfig, name: str | None, tp: TensorParallel) -> nn.Module:
    """Return the family's norm, or the identity where the name is None."""
    if name is None:
        return nn.Identity()
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, eps=config.norm_eps, name=name, tp=tp, offset=config.norm_offset)
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias, name=name, tp=tp)


def matrix_init(config: TransformerConfig, inputs: int, *, into_residual: bool = False) -> Init:
    """Return the initialisation of a matrix with so many inputs. `into_residual`: its outputs are
    added to the hidden states."""
    if config.fan_in_init:
        return Init(std=config.init_std / math.sqrt(inputs))
    if into_residual and config.scaled_residual_init:
        # Each layer adds 2 outputs to the residual: their sum keeps its variance (Radford et al.
        # 2019, GPT-2, §2.3).
        return Init(std=config.init_std / math.sqrt(2 * config.num_layers))
    return Init(std=config.init_std)


class Dropout(nn.Module):
    """Dropout of [N, D] activations outside the parallel regions; `site` names its random
    stream."""

    def __init__(self, rate: float, site: str, tp: TensorParallel) -> None:
        super().__init__()
        self.rate = rate
        self.site = site
        self.tp = tp

    def forward(self, x_ND: Tensor, documents: Documents, streams: Streams | None, chosen: Tensor | None = None) -> Tensor:
        """Return x with dropout. `streams` None: x unchanged (evaluation). `chosen`: x has only
        these of this rank's tokens."""
        if not self.rate or streams is None:
            return x_ND
        rows, seq_len = documents.shape
        tokens = self.tp.tokens(rows * seq_len)
        keeps_ND = streams.keeps_features(self.site, self.rate, (seq_len, x_ND.shape[1]), tokens, x_ND.device)
        return dropout(x_ND, keeps_ND if chosen is None else keeps_ND[chosen], self.rate)


def final_dropout(config: TransformerConfig, names: WeightNames, tp: TensorParallel) -> Dropout:
    """Return the dropout after the last norm of a stack."""
    return Dropout(config.final_dropout, f"{names.final_norm}.outputs", tp)
