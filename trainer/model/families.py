"""The families of models as tables.

A family is the keys of its own config class with their defaults, the translation of each, the keys
of bookkeeping, and the keys that are accepted only with the value that the network here computes.
No torch, so that `check` can translate.

To add a family, add one `Family` here and its weight names in `names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from trainer.model.hf_keys import (
    Key,
    Whole,
    activation,
    activation_name,
    at_least_one,
    feed_forward,
    feed_forward_name,
    flag,
    gemma_activation_name,
    gemma_window,
    key,
    layer_types,
    optional_flag,
    optional_rate,
    positive,
    rate,
    soft_cap,
    standard_deviation,
)

HIDDEN = Whole(2**18)
LAYERS = Whole(2**12)
HEADS = Whole(2**12)
FFN = Whole(2**21, optional=True)
POSITIONS = Whole(2**24)
VOCABULARY = Whole(2**24)
HEAD_DIM = Whole(2**14, optional=True)
KV_HEADS = Whole(HEADS.limit, optional=True)
WINDOW = Whole(2**24, optional=True)

# Keys that transformers writes into every config.json and on which training does not depend.
BOOKKEEPING = """
_attn_implementation_autoset _name_or_path architectures attn_implementation bad_words_ids begin_suppress_tokens
bos_token_id dtype eos_token_id finetuning_task id2label is_decoder label2id name_or_path num_labels output_attentions
output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id task_specific_params tokenizer_class
torch_dtype transformers_version use_cache use_return_dict
"""
GPT2_BOOKKEEPING = """
n_ctx summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
"""
# Keys that every family computes only in this way.
FIXED: Mapping[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
}


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face.

    | field | meaning |
    |---|---|
    | `keys` | the keys that are translated |
    | `constants` | fields of TransformerConfig in which the whole family differs from the plain transformer (`PLAIN`) |
    | `aliases` | other spellings that transformers accepts |
    | `echoes` | second copies of a key in folders, which transformers does not read; accepted when they agree |
    | `equal` | keys that transformers reads for the decoder alone; accepted when they have the encoder's value |
    | `ignored` | keys that change nothing in training |
    | `fixed` | keys that are accepted only with this value |
    | `overridable` | keys that may differ from a pretrained folder's: no weight's shape or meaning depends on them |
    | `windows` | the layers that have a sliding window when no `layer_types` lists them |
    | `free_head_dim` | head_dim · heads need not be the hidden size |
    """

    name: str
    architecture: str
    keys: Mapping[str, Key]
    constants: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    echoes: Mapping[str, str] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset(BOOKKEEPING.split())
    fixed: Mapping[str, Any] = field(default_factory=dict)
    overridable: frozenset[str] = frozenset()
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    windows: Literal["every layer", "last layers", "every other layer"] = "every layer"
    free_head_dim: bool = False

    @property
    def rope(self) -> bool:
        return bool(self.constants["positions"] == "rope")

    @property
    def classifier(self) -> str | None:
        """The architecture with a head over classes; None: there is none here."""
        for head in ("ForCausalLM", "LMHeadModel", "ForMaskedLM"):
            if self.architecture.endswith(head):
                return self.architecture.removesuffix(head) + "ForSequenceClassification"
        return None

    @property
    def causal(self) -> bool:
        return bool({**PLAIN, **self.constants}["causal"])

    @property
    def translates(self) -> bool:
        """Return whether it reads one text and writes another."""
        return any("encoder_layers" in rule.fields for rule in self.keys.values())

    @property
    def known(self) -> list[str]:
        """The accepted keys, those with an effect first."""
        rope = ROPE_KEYS if self.rope else ()
        others = (*self.aliases, *self.echoes, *self.equal, *self.fixed, *FIXED)
        return [*self.keys, *rope, *others, "model_type", *sorted(self.ignored)]


ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")
ROPE_THETA = 10_000.0

ROPE_SCALINGS: Mapping[str, Mapping[str, Key]] = {
    "default": {},
    "linear": {"factor": key("factor", None, at_least_one)},
    "llama3": {
        "factor": key("factor", None, at_least_one),
        "low_freq_factor": key("low_freq_factor", None, positive),
        "high_freq_factor": key("high_freq_factor", None, positive),
        "original_max_position_embeddings": key("original_positions", None, POSITIONS),
    },
}

# The transformer without any family's own features.
PLAIN: Mapping[str, Any] = {
    "rope_theta": ROPE_THETA,
    "rope_scaling": None,
    "norm_bias": False,
    "norm_offset": 0.0,
    "norm_position": "pre",
    "embedding_norm": False,
    "causal": True,
    "relative_buckets": 0,
    "relative_distance": 0,
    "encoder_layers": 0,
    "source_vocab_size": None,
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "query_scalar": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scaled_embedding": False,
    "scaled_head": False,
    "token_types": 0,
    "head_transform": False,
    "head_bias": False,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "mlp_dropout": 0.0,
    "final_dropout": 0.0,
    "classifier_dropout": None,
    "scaled_residual_init": False,
    "fan_in_init": False,
}

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": key("vocab_size", 50257, VOCABULARY),
        "n_positions": key("max_positions", 1024, POSITIONS),
        "n_embd": key("hidden_size", 768, HIDDEN),
        "n_layer": key("num_layers", 12, LAYERS),
        "n_head": key("num_heads", 12, HEADS),
        "n_inner": key("ffn_size", None, FFN),
        "activation_function": key("activation", "gelu_new", activation, activation_name),
        "resid_pdrop": key("residual_dropout", 0.1, rate),
        "embd_pdrop": key("embedding_dropout", 0.1, rate),
        "attn_pdrop": key("attention_dropout", 0.1, rate),
        "layer_norm_epsilon": key("norm_eps", 1e-5, positive),
        "initializer_range": key("init_std", 0.02, standard_deviation),
        "tie_word_embeddings": key("tied_head", True, flag),
    },
    constants={
        "norm": "layernorm",
        "norm_bias": True,
        "positions": "learned",
        "gated_mlp": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "scaled_residual_init": True,
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored=frozenset((BOOKKEEPING + GPT2_BOOKKEEPING).split()),
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False},
    overridable=frozenset(("resid_pdrop", "embd_pdrop", "attn_pdrop")),
)

# The keys that the descendants of Llama share; each table below gives the differences.
DECODER_KEYS = {
    "vocab_size": key("vocab_size", 32000, VOCABULARY),
    "hidden_size": key("hidden_size", 4096, HIDDEN),
    "intermediate_size": key("ffn_size", 11008, Whole(FFN.limit)),
    "num_hidden_layers": key("num_layers", 32, LAYERS),
    "num_attention_heads": key("num_heads", 32, HEADS),
    "num_key_value_heads": key("num_kv_heads", None, KV_HEADS),
    "max_position_embeddings": key("max_positions", 2048, POSITIONS),
    "initializer_range": key("init_std", 0.02, standard_deviation),
    "rms_norm_eps": key("norm_eps", 1e-6, positive),
    "tie_word_embeddings": key("tied_head", False, flag),
    "attention_dropout": key("attention_dropout", 0.0, rate),
}
LLAMA_KEYS = {**DECODER_KEYS, "hidden_act": key("activation", "silu", activation, activation_name)}
LLAMA_CONSTANTS = {"norm": "rmsnorm", "positions": "rope"}
ATTENTION_BIAS = Key(("qkv_bias", "attention_out_bias"), False, flag)
DROPOUT = frozenset(("attention_dropout",))

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    keys={
        **LLAMA_KEYS,
        "head_dim": key("head_dim", None, HEAD_DIM),
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": key("mlp_bias", False, flag),
    },
    constants=LLAMA_CONSTANTS,
    fixed={"pretraining_tp": 1, "partial_rotary_factor": 1.0},
    overridable=DROPOUT,
)

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    keys={
        **LLAMA_KEYS,
        "intermediate_size": key("ffn_size", 14336, Whole(FFN.limit)),
        "num_key_value_heads": key("num_kv_heads", 8, KV_HEADS),
        "head_dim": key("head_dim", None, HEAD_DIM),
        "max_position_embeddings": key("max_positions", 131072, POSITIONS),
        "sliding_window": key("sliding_window", 4096, WINDOW),
    },
    constants=LLAMA_CONSTANTS,
    fixed={"partial_rotary_factor": 1.0},
    overridable=DROPOUT,
    free_head_dim=True,
)

QWEN_KEYS = {
    **LLAMA_KEYS,
    "vocab_size": key("vocab_size", 151936, VOCABULARY),
    "intermediate_size": key("ffn_size", 22016, Whole(FFN.limit)),
    "num_key_value_heads": key("num_kv_heads", 32, KV_HEADS),
    "max_position_embeddings": key("max_positions", 32768, POSITIONS),
    "use_sliding_window": key("use_sliding_window", False, flag),
    "sliding_window": key("sliding_window", 4096, WINDOW),
    "max_window_layers": key("max_window_layers", 28, Whole(LAYERS.limit, smallest=0)),
    "layer_types": key("layer_types", None, layer_types),
}

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=QWEN_KEYS,
    constants={**LLAMA_CONSTANTS, "qkv_bias": True},
    fixed={"partial_rotary_factor": 1.0, "use_mrope": False},
    overridable=DROPOUT,
    windows="last layers",
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={**QWEN_KEYS, "head_dim": key("head_dim", 128, Whole(HEAD_DIM.limit)), "attention_bias": ATTENTION_BIAS},
    constants={**LLAMA_CONSTANTS, "qk_norm": True},
    fixed={"partial_rotary_factor": 1.0},
    overridable=DROPOUT,
    windows="last layers",
    free_head_dim=True,
)

PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    keys={
        **LLAMA_KEYS,
        "vocab_size": key("vocab_size", 32064, VOCABULARY),
        "hidden_size": key("hidden_size", 3072, HIDDEN),
        "intermediate_size": key("ffn_size", 8192, Whole(FFN.limit)),
        "max_position_embeddings": key("max_positions", 4096, POSITIONS),
        "rms_norm_eps": key("norm_eps", 1e-5, positive),
        "resid_pdrop": key("residual_dropout", 0.0, rate),
        "sliding_window": key("sliding_window", None, WINDOW),
    },
    constants=LLAMA_CONSTANTS,
    # The original length matters to longrope only, and auto_map names code that is never run.
    ignored=frozenset((BOOKKEEPING + "auto_map original_max_position_embeddings").split()),
    # transformers has embd_pdrop among its keys but drops nothing.
    fixed={"partial_rotary_factor": 1.0, "attention_bias": False, "embd_pdrop": 0.0},
    overridable=frozenset(("attention_dropout", "resid_pdrop")),
    rope_types=("default",),
)

GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    keys={
        **DECODER_KEYS,
        "vocab_size": key("vocab_size", 256000, VOCABULARY),
        "hidden_size": key("hidden_size", 2304, HIDDEN),
        "intermediate_size": key("ffn_size", 9216, Whole(FFN.limit)),
        "num_hidden_layers": key("num_layers", 26, LAYERS),
        "num_attention_heads": key("num_heads", 8, HEADS),
        "num_key_value_heads": key("num_kv_heads", 4, Whole(HEADS.limit)),
        "head_dim": key("head_dim", 256, Whole(HEAD_DIM.limit)),
        "hidden_activation": key("activation", "gelu_pytorch_tanh", activation, gemma_activation_name),
        "max_position_embeddings": key("max_positions", 8192, POSITIONS),
        "tie_word_embeddings": key("tied_head", True, flag),
        "attention_bias": ATTENTION_BIAS,
        "query_pre_attn_scalar": key("query_scalar", 256, Whole(2**20)),
        "attn_logit_softcapping": key("attention_softcap", 50.0, soft_cap),
        "final_logit_softcapping": key("logit_softcap", 30.0, soft_cap),
        "sliding_window": key("sliding_window", 4096, Whole(WINDOW.limit), gemma_window),
        "layer_types": key("layer_types", None, layer_types),
    },
    constants={**LLAMA_CONSTANTS, "norm_offset": 1.0, "norm_position": "sandwich", "scaled_embedding": True},
    echoes={"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"},
    ignored=frozenset((BOOKKEEPING + "cache_implementation").split()),
    fixed={"partial_rotary_factor": 1.0, "use_bidirectional_attention": None},
    overridable=DROPOUT,
    windows="every other layer",
)

# Keys that Google's first checkpoints wrote; nothing in transformers reads them.
BERT_BOOKKEEPING = """
directionality gradient_checkpointing pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
pooler_size_per_head pooler_type
"""

# Devlin et al. 2018, arXiv:1810.04805, with the masked-language head.
BERT = Family(
    name="bert",
    architecture="BertForMaskedLM",
    keys={
        "vocab_size": key("vocab_size", 30522, VOCABULARY),
        "hidden_size": key("hidden_size", 768, HIDDEN),
        "num_hidden_layers": key("num_layers", 12, LAYERS),
        "num_attention_heads": key("num_heads", 12, HEADS),
        "intermediate_size": key("ffn_size", 3072, Whole(FFN.limit)),
        "hidden_act": key("activation", "gelu", activation, activation_name),
        "hidden_dropout_prob": Key(("embedding_dropout", "residual_dropout"), 0.1, rate),
        "attention_probs_dropout_prob": key("attention_dropout", 0.1, rate),
        "classifier_dropout": key("classifier_dropout", None, optional_rate),
        "max_position_embeddings": key("max_positions", 512, POSITIONS),
        "type_vocab_size": key("token_types", 2, Whole(2**10)),
        "initializer_range": key("init_std", 0.02, standard_deviation),
        "layer_norm_eps": key("norm_eps", 1e-12, positive),
    },
    constants={
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "post",
        "embedding_norm": True,
        "causal": False,
        "positions": "learned",
        "gated_mlp": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tied_head": True,
        "head_transform": True,
        "head_bias": True,
    },
    ignored=frozenset((BOOKKEEPING + BERT_BOOKKEEPING).split()),
    # An untied head would leave transformers' cls.predictions.bias without a reader.
    fixed={"is_decoder": False, "position_embedding_type": "absolute", "tie_word_embeddings": True},
    overridable=frozenset(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")),
)

# The limits and the beams of generation, and keys that Marian's converter wrote; training reads
# none of them.
MARIAN_BOOKKEEPING = """
_num_labels add_bias_logits add_final_layer_norm classif_dropout classifier_dropout decoder_start_token_id early_stopping
extra_pos_embeddings forced_eos_token_id gradient_checkpointing length_penalty max_length normalize_before
normalize_embedding num_beams static_position_embeddings
"""

# Vaswani et al. 2017, arXiv:1706.03762, in Marian's form (Junczys-Dowmunt et al. 2018,
# arXiv:1804.00344).
MARIAN = Family(
    name="marian",
    architecture="MarianMTModel",
    keys={
        "vocab_size": key("vocab_size", 58101, VOCABULARY),
        "decoder_vocab_size": key("target_vocab_size", None, Whole(VOCABULARY.limit, optional=True)),
        "share_encoder_decoder_embeddings": key("shared_embedding", True, flag),
        "d_model": key("hidden_size", 1024, HIDDEN),
        "encoder_layers": key("encoder_layers", 12, LAYERS),
        "decoder_layers": key("decoder_layers", 12, LAYERS),
        "encoder_attention_heads": key("num_heads", 16, HEADS),
        "encoder_ffn_dim": key("ffn_size", 4096, Whole(FFN.limit)),
        "activation_function": key("activation", "gelu", activation, activation_name),
        "max_position_embeddings": key("max_positions", 1024, POSITIONS),
        "dropout": Key(("embedding_dropout", "residual_dropout"), 0.1, rate),
        "attention_dropout": key("attention_dropout", 0.0, rate),
        "activation_dropout": key("mlp_dropout", 0.0, rate),
        "init_std": key("init_std", 0.02, standard_deviation),
        "scale_embedding": key("scaled_embedding", False, flag),
    },
    constants={
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "norm_bias": True,
        "norm_position": "post",
        "positions": "sinusoidal",
        "gated_mlp": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tied_head": True,
        "head_bias": True,
    },
    equal={"decoder_attention_heads": "encoder_attention_heads", "decoder_ffn_dim": "encoder_ffn_dim"},
    echoes={"num_hidden_layers": "encoder_layers"},
    ignored=frozenset((BOOKKEEPING + MARIAN_BOOKKEEPING).split()),
    fixed={
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    },
    overridable=frozenset(("dropout", "attention_dropout", "activation_dropout")),
)

# The limits of generation, keys that the first checkpoints wrote, and keys that follow from
# feed_forward_proj.
T5_BOOKKEEPING = """
classifier_dropout decoder_start_token_id dense_act_fn early_stopping gradient_checkpointing is_gated_act length_penalty
max_length n_positions num_beams output_past
"""

# Raffel et al. 2020, arXiv:1910.10683; its version 1.1, and Flan-T5, have a gated MLP (Shazeer
# 2020, arXiv:2002.05202) and a head of their own.
T5 = Family(
    name="t5",
    architecture="T5ForConditionalGeneration",
    keys={
        "vocab_size": key("vocab_size", 32128, VOCABULARY),
        "d_model": key("hidden_size", 512, HIDDEN),
        "d_kv": key("head_dim", 64, Whole(HEAD_DIM.limit)),
        "d_ff": key("ffn_size", 2048, Whole(FFN.limit)),
        "num_layers": key("encoder_layers", 6, LAYERS),
        "num_decoder_layers": key("decoder_layers", None, Whole(LAYERS.limit, optional=True)),
        "num_heads": key("num_heads", 8, HEADS),
        # Half of the buckets serve one direction, and half of these have one distance each.
        "relative_attention_num_buckets": key("relative_buckets", 32, Whole(2**16, smallest=4)),
        "relative_attention_max_distance": key("relative_distance", 128, POSITIONS),
        "feed_forward_proj": key("feed_forward", "relu", feed_forward, feed_forward_name),
        "dropout_rate": Key(
            ("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout", "final_dropout"), 0.1, rate
        ),
        "layer_norm_epsilon": key("norm_eps", 1e-6, positive),
        "initializer_factor": key("init_std", 1.0, positive),
        "tie_word_embeddings": key("tied_head", True, flag),
        "scale_decoder_outputs": key("scaled_head", None, optional_flag),
    },
    constants={
        "norm": "rmsnorm",
        "positions": "relative",
        "max_positions": POSITIONS.limit,  # a table of distances has no last position
        "query_scalar": 1,
        "fan_in_init": True,
    },
    aliases={
        "hidden_size": "d_model",
        "head_dim": "d_kv",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    },
    ignored=frozenset((BOOKKEEPING + T5_BOOKKEEPING).split()),
    fixed={"is_encoder_decoder": True},
    overridable=frozenset(("dropout_rate",)),
    free_head_dim=True,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, BERT, MARIAN, T5)}
)
