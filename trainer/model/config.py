"""The config of a network of our own families, with our names. No torch, so that `check` can use
it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Up to this many classes an evaluation counts all pairs of the true class and the predicted one (8
# MB); for more, it counts for each class the right predictions, the texts and the predictions.
PAIRED_CLASSES = 1000


@dataclass(frozen=True)
class RopeScaling:
    """The scaling of rotary frequencies with which a model reads longer texts than in its first
    training.

    linear: all are divided by `factor` (Chen et al. 2023, arXiv:2306.15595). llama3: those that
    turn less than `low_freq_factor` times in `original_positions` tokens are divided by `factor`,
    those that turn more than `high_freq_factor` times are not changed, and the others are
    interpolated (Grattafiori et al. 2024, arXiv:2407.21783, and Meta's reference code).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_positions: int = 0


@dataclass(frozen=True)
class TransformerConfig:
    """The config of a network, with our names; sizes in elements, rates as probabilities.

    | field | meaning |
    |---|---|
    | `windows` | per layer, how many of the last tokens (itself included) a token attends to; None: its whole document |
    | `norm_offset` | the norms multiply by weight + offset (1 in Gemma, whose weights start and decay at 0) |
    | `norm_position` | pre: x + f(norm(x)); sandwich: x + norm(f(norm(x))); post: norm(x + f(x)), and none before the head |
    | `embedding_norm` | embeddings are normalised before their dropout |
    | `positions` | relative: attention depends on distances; one table for the encoder's layers, one for the decoder's |
    | `relative_buckets`, `relative_distance` | rows of such a table, and the distance from which on the last row is used |
    | `causal` | a token attends to itself and those before it; else to its whole document |
    | `encoder_layers` | the first so many layers read a source, the others write its target; 0: there is one text |
    | `source_vocab_size` | rows of the source's own embedding; None: it uses the target's |
    | `qk_norm` | queries and keys are normalised in each head before they are rotated |
    | `query_scalar` | attention logits are divided by its square root |
    | `attention_softcap`, `logit_softcap` | logits x become cap · tanh(x / cap); None: they are not changed |
    | `scaled_embedding` | embeddings of tokens are multiplied by √hidden_size |
    | `scaled_head` | hidden states are divided by √hidden_size before the logits |
    | `token_types` | rows of the table of segments (the two texts of a pair); 0: there is none |
    | `head_transform` | before the logits: a linear layer of the hidden size, the activation and a norm |
    | `head_bias` | a bias for each symbol on the logits |
    | `final_dropout` | dropout after the final norms of encoder and decoder |
    | `fan_in_init` | matrices start with `init_std` / √(their inputs), those of queries with that / √head_dim |
    | `classes` | names of the classes, with a head over them in place of that over the vocabulary; (): there is none |
    | `new_tokens` | ids, in order, whose rows of embedding and head are trained also where other weights are frozen |
    | `classifier_dropout` | before the head over classes where it pools; None: as in the residuals |
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    norm_offset: float
    norm_position: Literal["pre", "sandwich", "post"]
    embedding_norm: bool
    causal: bool
    encoder_layers: int
    source_vocab_size: int | None
    positions: Literal["learned", "rope", "sinusoidal", "relative"]
    relative_buckets: int
    relative_distance: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    windows: tuple[int | None, ...]
    qk_norm: bool
    query_scalar: int
    attention_softcap: float | None
    logit_softcap: float | None
    scaled_embedding: bool
    scaled_head: bool
    token_types: int
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
    gated_mlp: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    norm_bias: bool
    tied_head: bool
    head_transform: bool
    head_bias: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    mlp_dropout: float
    final_dropout: float
    init_std: float
    scaled_residual_init: bool
    fan_in_init: bool
    classifier_dropout: float | None = None
    classes: tuple[str, ...] = ()
    new_tokens: tuple[int, ...] = ()

    @property
    def ties_head(self) -> bool:
        """Return whether a head over the vocabulary shares the embedding's weight."""
        return self.tied_head and not self.classes

    @property
    def writes(self) -> bool:
        """Return whether the model generates text, token after token."""
        return not self.classes and (self.causal or self.encoder_layers > 0)

    @property
    def largest_weight(self) -> int:
        """Return the elements of the largest single weight, with queries, keys and values fused,
        and gate with up."""
        D = self.hidden_size
        fused_attention = D * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        fused_mlp = D * self.ffn_size * (2 if self.gated_mlp else 1)
        positions = self.max_positions if self.positions == "learned" else 0
        vocab_size = max(self.vocab_size, self.source_vocab_size or 0)
        return max(D * max(vocab_size, positions, self.token_types), fused_attention, fused_mlp)

    def save_code(self, folder: Path) -> None:
        """Do nothing: the code of these models is transformers' own."""
