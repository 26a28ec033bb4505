"""Families of models as tables: from Hugging Face's config names to ours, and back.

A family is its own config class's keys with their defaults, how each translates, which are bookkeeping, and which are
accepted only with the value that the network here computes. Anything else is refused by name: a config that asks for
mathematics that is not there must not train something else. No torch, so that `check` can translate.

Adding a family: one `Family` here, its weight names in `names.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from trainer.errors import RecipeError
from trainer.sections import Finding, nearest


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed down so that a model reads longer texts than it was first trained on.

    linear: all of them by `factor` (Chen et al. 2023, arXiv:2306.15595). llama3: those that turn less than `low_freq_factor`
    times in `original_positions` tokens by `factor`, those that turn more than `high_freq_factor` times not at all, the
    others in between (Grattafiori et al. 2024, arXiv:2407.21783, and Meta's reference code).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_positions: int = 0


@dataclass(frozen=True)
class TransformerConfig:
    """What the network needs to know, in our names; sizes in elements, rates as probabilities.

    | field | meaning |
    |---|---|
    | `windows` | per layer, how many of the last tokens (itself included) a token attends to; None: its whole document |
    | `norm_offset` | the norms multiply by weight + offset (1 in Gemma, whose weights start and decay at 0) |
    | `norm_position` | pre: x + f(norm(x)); sandwich: x + norm(f(norm(x))); post: norm(x + f(x)), and none before the head |
    | `embedding_norm` | embeddings are normalised before their dropout |
    | `causal` | a token attends to itself and those before it; else to its whole document |
    | `qk_norm` | queries and keys are normalised head by head before they are rotated |
    | `query_scalar` | attention logits are divided by its square root |
    | `attention_softcap`, `logit_softcap` | logits x become cap · tanh(x / cap); None: they stay |
    | `scaled_embedding` | embeddings are multiplied by √hidden_size |
    | `token_types` | rows of a table that tells the texts of a pair apart; 0: there is none |
    | `head_transform` | before the logits a linear layer of the hidden size, the activation and a norm |
    | `head_bias` | one bias for each symbol on the logits |
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
    positions: Literal["learned", "rope"]
    rope_theta: float
    rope_scaling: RopeScaling | None
    windows: tuple[int | None, ...]
    qk_norm: bool
    query_scalar: int
    attention_softcap: float | None
    logit_softcap: float | None
    scaled_embedding: bool
    token_types: int
    activation: Literal["gelu", "gelu_tanh", "silu"]
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
    init_std: float
    scaled_residual_init: bool


# Reading a value: return it in our terms, or raise ValueError with what would be right.


@dataclass(frozen=True)
class Whole:
    """A size, `smallest` to `limit`. The limits are about ten times the largest published, so that a slip of the finger is
    refused at the door instead of filling the memory. `optional`: null stands for a value derived from others."""

    limit: int
    optional: bool = False
    smallest: int = 1

    def __call__(self, value: Any) -> int | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("a whole number")
        if not self.smallest <= value <= self.limit:
            raise ValueError(f"{self.smallest} to {self.limit}")
        return value


def rate(value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError("a number in [0, 1)")
    return float(value)


def positive(value: Any) -> float:
    if not _is_number(value) or not 0.0 < value < float("inf"):
        raise ValueError("a number above 0")
    return float(value)


def at_least_one(value: Any) -> float:
    if not _is_number(value) or not 1.0 <= value < float("inf"):
        raise ValueError("a number of at least 1")
    return float(value)


def standard_deviation(value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError("a number in [0, 1]")
    return float(value)


def soft_cap(value: Any) -> float | None:
    return None if value is None else positive(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


# Hugging Face's names for one function; the first name of each is the one written back.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError("one of " + ", ".join(ACTIVATIONS))
    return ACTIVATIONS[value]


def _activation_name(value: str) -> str:
    return next(name for name, ours in ACTIVATIONS.items() if ours == value)


def _gemma_activation_name(value: str) -> str:
    """What Gemma's own folders call it."""
    return "gelu_pytorch_tanh" if value == "gelu_tanh" else _activation_name(value)


def _gemma_window(value: int | None) -> int:
    """transformers wants a window even where `layer_types` gives it to no layer."""
    return 4096 if value is None else value


LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_types(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(kind in LAYER_TYPES for kind in value):
        raise ValueError("null or a list with one of " + ", ".join(LAYER_TYPES) + " for each layer")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """How one Hugging Face key translates: our field(s), transformers' own default, reading and writing its value."""

    fields: tuple[str, ...]
    default: Any
    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = _same


def key(name: str, default: Any, read: Callable[[Any], Any], write: Callable[[Any], Any] = _same) -> Key:
    return Key((name,), default, read, write)


HIDDEN = Whole(2**18)
LAYERS = Whole(2**12)
HEADS = Whole(2**12)
FFN = Whole(2**21, optional=True)
POSITIONS = Whole(2**24)
VOCABULARY = Whole(2**24)
HEAD_DIM = Whole(2**14, optional=True)
KV_HEADS = Whole(HEADS.limit, optional=True)
WINDOW = Whole(2**24, optional=True)

# What transformers writes into every config.json and what training does not depend on.
BOOKKEEPING = """
_attn_implementation_autoset _name_or_path architectures attn_implementation bad_words_ids begin_suppress_tokens
bos_token_id dtype eos_token_id finetuning_task id2label is_decoder label2id name_or_path num_labels output_attentions
output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id task_specific_params tokenizer_class
torch_dtype transformers_version use_cache use_return_dict
"""
GPT2_BOOKKEEPING = """
n_ctx summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
"""
# What every family computes only in this way.
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
    """One architecture of Hugging Face.

    `keys` translate; `aliases` are other spellings that transformers accepts; `echoes` are second copies of a key that
    folders carry and transformers does not read, accepted when they agree; `ignored` changes nothing in training; `fixed`
    is accepted only with this value; `constants` are fields of TransformerConfig in which the family differs from the
    plain transformer (`PLAIN`) and that it never varies; `overridable` keys may differ from those of a pretrained folder,
    because no weight's shape or meaning depends on them. `windows` says which layers have a sliding window when no
    `layer_types` lists them. `free_head_dim`: head_dim · heads need not be the hidden size.
    """

    name: str
    architecture: str
    keys: Mapping[str, Key]
    constants: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    echoes: Mapping[str, str] = field(default_factory=dict)
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
    def causal(self) -> bool:
        return bool({**PLAIN, **self.constants}["causal"])

    @property
    def known(self) -> list[str]:
        """All accepted keys, those that do something first."""
        rope = ROPE_KEYS if self.rope else ()
        others = (*self.aliases, *self.echoes, *self.fixed, *FIXED)
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

# The transformer without any family's specialities.
PLAIN: Mapping[str, Any] = {
    "rope_theta": ROPE_THETA,
    "rope_scaling": None,
    "norm_bias": False,
    "norm_offset": 0.0,
    "norm_position": "pre",
    "embedding_norm": False,
    "causal": True,
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "query_scalar": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scaled_embedding": False,
    "token_types": 0,
    "head_transform": False,
    "head_bias": False,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "scaled_residual_init": False,
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
        "activation_function": key("activation", "gelu_new", activation, _activation_name),
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

# What the descendants of Llama share; each table below says where it differs.
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
LLAMA_KEYS = {**DECODER_KEYS, "hidden_act": key("activation", "silu", activation, _activation_name)}
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
        "hidden_activation": key("activation", "gelu_pytorch_tanh", activation, _gemma_activation_name),
        "max_position_embeddings": key("max_positions", 8192, POSITIONS),
        "tie_word_embeddings": key("tied_head", True, flag),
        "attention_bias": ATTENTION_BIAS,
        "query_pre_attn_scalar": key("query_scalar", 256, Whole(2**20)),
        "attn_logit_softcapping": key("attention_softcap", 50.0, soft_cap),
        "final_logit_softcapping": key("logit_softcap", 30.0, soft_cap),
        "sliding_window": key("sliding_window", 4096, Whole(WINDOW.limit), _gemma_window),
        "layer_types": key("layer_types", None, layer_types),
    },
    constants={**LLAMA_CONSTANTS, "norm_offset": 1.0, "norm_position": "sandwich", "scaled_embedding": True},
    echoes={"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"},
    ignored=frozenset((BOOKKEEPING + "cache_implementation").split()),
    fixed={"partial_rotary_factor": 1.0, "use_bidirectional_attention": None},
    overridable=DROPOUT,
    windows="every other layer",
)

# The heads behind the encoder, and what Google's first checkpoints wrote; nothing in BertForMaskedLM reads them.
BERT_BOOKKEEPING = """
classifier_dropout directionality gradient_checkpointing pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
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
        "hidden_act": key("activation", "gelu", activation, _activation_name),
        "hidden_dropout_prob": Key(("embedding_dropout", "residual_dropout"), 0.1, rate),
        "attention_probs_dropout_prob": key("attention_dropout", 0.1, rate),
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
    overridable=frozenset(("hidden_dropout_prob", "attention_probs_dropout_prob")),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, BERT)}
)


def translate(family: str, hf_config: Mapping[str, Any]) -> TransformerConfig:
    """The network that a Hugging Face config describes. RecipeError with one line per thing that is wrong with it."""
    config, findings = read_config(family, hf_config)
    if config is None:
        raise RecipeError([finding.message for finding in findings])
    return config


def read_config(family: str, hf_config: Mapping[str, Any]) -> tuple[TransformerConfig | None, list[Finding]]:
    """The network, or None, and all that is wrong; a finding's keys are Hugging Face's."""
    if family not in FAMILIES:
        return None, [
            Finding((), f"unknown family {json.dumps(family)}{_did_you_mean(family, list(FAMILIES))}; {_legal_families()}")
        ]
    spec = FAMILIES[family]
    findings = list(_refused(spec, hf_config))
    values: dict[str, Any] = {**PLAIN, **spec.constants}
    for name, rule in spec.keys.items():
        given = _spelling(spec, name, hf_config)
        try:
            value = rule.read(hf_config.get(given, rule.default))
        except ValueError as error:
            findings.append(Finding((given,), f"{given} = {json.dumps(hf_config[given])}: must be {error}"))
            continue
        values.update(dict.fromkeys(rule.fields, value))
    if spec.rope:
        findings.extend(_read_rope(spec, hf_config, values))
    if not findings:
        findings.extend(_window_findings(values))
    if findings:
        return None, findings
    config = _derive(spec, values)
    findings = list(_shape_findings(spec, config))
    return (None if findings else config), findings


def _legal_families() -> str:
    return "legal: " + ", ".join(FAMILIES)


def _did_you_mean(word: str, names: list[str]) -> str:
    meant = nearest(word, names)
    return f"; did you mean {meant}?" if meant else ""


def _spelling(family: Family, name: str, hf_config: Mapping[str, Any]) -> str:
    """The spelling of `name` that the config uses."""
    return next((alias for alias, of in family.aliases.items() if of == name and alias in hf_config), name)


def _refused(family: Family, hf_config: Mapping[str, Any]) -> Iterator[Finding]:
    known = family.known
    fixed = {**FIXED, **family.fixed, "model_type": family.name}
    for name, value in hf_config.items():
        if name not in known:
            yield Finding((name,), f"unknown key {json.dumps(name)} for family {family.name}{_did_you_mean(name, known)}")
        elif name in fixed and value != fixed[name]:
            message = f"{name} = {json.dumps(value)} is not supported by family {family.name} here; legal: "
            yield Finding((name,), message + json.dumps(fixed[name]))
        elif name in family.aliases and family.aliases[name] in hf_config:
            yield Finding((name,), f"{name} and {family.aliases[name]} are two names of one value: give one of them")
        elif name in family.echoes:
            of = family.echoes[name]
            heard = hf_config.get(of, family.keys[of].default)
            if value != heard:
                message = f"{name} = {json.dumps(value)}, but {of} = {json.dumps(heard)} is what counts: remove {name}"
                yield Finding((name, of), message)


def _read_rope(family: Family, hf_config: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Finding]:
    """Set rope_theta and rope_scaling: transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling."""
    thetas: dict[str, Any] = {}
    scalings: dict[str, RopeScaling | None] = {}
    wrong: list[tuple[str, str]] = []
    for name in ("rope_parameters", "rope_scaling"):
        block = hf_config.get(name)
        if isinstance(block, Mapping) and block:
            if "rope_theta" in block:
                thetas[f"{name}.rope_theta"] = block["rope_theta"]
            scalings[name], messages = _rope_scaling(family, name, block, values.get("max_positions"))
            wrong += [(name, message) for message in messages]
        elif block is not None and block != {}:
            wrong.append((name, f"{name} = {json.dumps(block)}: must be an object or null"))
    if hf_config.get("rope_theta") is not None:
        thetas["rope_theta"] = hf_config["rope_theta"]
    for name, theta in thetas.items():
        try:
            positive(theta)
        except ValueError as error:
            wrong.append((name.split(".")[0], f"{name} = {json.dumps(theta)}: must be {error}"))
    if not wrong and len(set(thetas.values())) > 1:
        said = " but ".join(f"{name} = {json.dumps(theta)}" for name, theta in thetas.items())
        wrong.append((next(iter(thetas)).split(".")[0], f"{said}: give one of them"))
    if not wrong and len(set(scalings.values())) > 1:
        wrong.append(("rope_scaling", "rope_parameters and rope_scaling disagree: give one of them"))
    for name, message in wrong:
        yield Finding((name,), message)
    if not wrong:
        values["rope_theta"] = float(next(iter(thetas.values()), ROPE_THETA))
        values["rope_scaling"] = next(iter(scalings.values()), None)


def _rope_scaling(
    family: Family, name: str, block: Mapping[str, Any], max_positions: int | None
) -> tuple[RopeScaling | None, list[str]]:
    """The scaling that rope_parameters or rope_scaling (`name`) asks for, and what is wrong with it."""
    kind = block.get("rope_type", block.get("type", "default"))
    if kind not in family.rope_types:
        legal = ", ".join(json.dumps(legal) for legal in family.rope_types)
        return None, [f"{name}.rope_type = {json.dumps(kind)} is not supported by family {family.name} here; legal: {legal}"]
    rules = ROPE_SCALINGS[kind]
    extra = sorted(block.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *rules})
    wrong = [f"unknown key {name}.{key} for rope_type {kind}" for key in extra]
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"{name}.partial_rotary_factor is not supported; legal: 1.0")
    values = {}
    for hf_name, rule in rules.items():
        given = block.get(hf_name, max_positions if rule.fields == ("original_positions",) else None)
        try:
            values[rule.fields[0]] = rule.read(given)
        except ValueError as error:
            wrong.append(f"{name}.{hf_name} = {json.dumps(given)}: must be {error}")
    if kind == "llama3" and not wrong and values["high_freq_factor"] <= values["low_freq_factor"]:
        wrong.append(f"{name}.high_freq_factor must be above low_freq_factor = {json.dumps(values['low_freq_factor'])}")
    return (None if wrong or kind == "default" else RopeScaling(kind, **values)), wrong


def _window_findings(values: Mapping[str, Any]) -> Iterator[Finding]:
    listed, num_layers = values.get("layer_types"), values["num_layers"]
    if listed is None:
        return
    if len(listed) != num_layers:
        message = f"layer_types lists {len(listed)} layers, num_hidden_layers = {num_layers}: they must agree"
        yield Finding(("layer_types", "num_hidden_layers"), message)
    if "sliding_attention" in listed and _window_size(values) is None:
        off = "use_sliding_window = false" if not values.get("use_sliding_window", True) else "sliding_window = null"
        message = f"layer_types has sliding_attention, but {off}: give the window, or full_attention"
        yield Finding(("layer_types", off.split()[0]), message)


def _window_size(values: Mapping[str, Any]) -> int | None:
    return values.get("sliding_window") if values.get("use_sliding_window", True) else None


def _windows(family: Family, values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window: where `layer_types` says so, or the family's own rule."""
    window, listed, full_layers = _window_size(values), values.get("layer_types"), values.get("max_window_layers", 0)

    def slides(layer: int) -> bool:
        if listed is not None:
            return bool(listed[layer] == "sliding_attention")
        if family.windows == "last layers":
            return bool(layer >= full_layers)
        return family.windows == "every layer" or layer % 2 == 0

    return tuple(window if slides(layer) else None for layer in range(values["num_layers"]))


def _window_keys(config: TransformerConfig) -> dict[str, Any]:
    """The windows in Hugging Face's words; a family writes those that it has."""
    sliding = [window is not None for window in config.windows]
    return {
        "sliding_window": next((window for window in config.windows if window is not None), None),
        "use_sliding_window": any(sliding),
        "max_window_layers": sliding.index(True) if any(sliding) else config.num_layers,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
    }


def _derive(family: Family, values: dict[str, Any]) -> TransformerConfig:
    """Fill in what a config may leave to others: n_inner = 4 n_embd, key/value heads = heads, head_dim = D / H."""
    if values["ffn_size"] is None:
        values["ffn_size"] = 4 * values["hidden_size"]
    if values.get("num_kv_heads") is None:
        values["num_kv_heads"] = values["num_heads"]
    if values.get("head_dim") is None:
        values["head_dim"] = max(1, values["hidden_size"] // values["num_heads"])
    if values["query_scalar"] is None:
        values["query_scalar"] = values["head_dim"]
    values["windows"] = _windows(family, values)
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(family=family.name, **{name: value for name, value in values.items() if name in fields})


def _hf_name(family: Family, our_field: str) -> str:
    return next(name for name, rule in family.keys.items() if our_field in rule.fields)


def _shape_findings(family: Family, config: TransformerConfig) -> Iterator[Finding]:
    hidden, heads = _hf_name(family, "hidden_size"), _hf_name(family, "num_heads")
    D, H, KV = config.hidden_size, config.num_heads, config.num_kv_heads
    explicit = config.head_dim != D // H
    if D % H and not (explicit and family.free_head_dim):
        legal = _divisors_near(D, H)
        yield Finding((heads, hidden), f"{hidden} = {D} is not a multiple of {heads} = {H}; nearest legal {heads}: {legal}")
    if H % KV:
        kv_heads = _hf_name(family, "num_kv_heads")
        legal = _divisors_near(H, KV)
        yield Finding(
            (kv_heads, heads), f"{heads} = {H} is not a multiple of {kv_heads} = {KV}; nearest legal {kv_heads}: {legal}"
        )
    if family.rope and config.head_dim % 2 and explicit:
        yield Finding(("head_dim",), f"head_dim = {config.head_dim}: rotary positions need an even head size")
    elif family.rope and config.head_dim % 2 and not D % H:
        yield Finding(
            (hidden, heads), f"rotary positions need an even head size, but {hidden} / {heads} gives {config.head_dim}"
        )


def _divisors_near(n: int, wanted: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below = [d for d in divisors if d <= wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)


def to_hf_config(config: TransformerConfig, *, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json with which transformers loads exported weights. `dtype`: "float32", "bfloat16" or "float16".

    The end-of-document token also begins a text: in training every document follows one.
    """
    family = FAMILIES[config.family]
    values = {**dataclasses.asdict(config), **_window_keys(config)}
    written = {name: rule.write(values[rule.fields[0]]) for name, rule in family.keys.items()}
    if family.rope:
        # Both spellings: transformers 5 reads the first, older readers the second.
        scaling = _rope_scaling_keys(config.rope_scaling)
        written["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
        written["rope_theta"] = config.rope_theta
        if scaling:
            written["rope_scaling"] = scaling
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": dtype,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        **written,
        **family.fixed,
    }


def _rope_scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    values = dataclasses.asdict(scaling)
    return {"rope_type": scaling.kind, **{name: values[rule.fields[0]] for name, rule in ROPE_SCALINGS[scaling.kind].items()}}


def count_parameters(config: TransformerConfig) -> int:
    """Elements of all weights; a head tied to the embedding once."""
    D, F, V = config.hidden_size, config.ffn_size, config.vocab_size
    queries, keys_values = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    norm = D * (1 + config.norm_bias)
    attention = D * (queries + keys_values) + config.qkv_bias * (queries + keys_values)
    attention += queries * D + config.attention_out_bias * D
    inputs = 2 if config.gated_mlp else 1
    mlp = (inputs + 1) * D * F + config.mlp_bias * (inputs * F + D)
    embeddings = V * D * (1 if config.tied_head else 2)
    if config.positions == "learned":
        embeddings += config.max_positions * D
    embeddings += config.token_types * D + config.embedding_norm * norm
    norms = norm * (4 if config.norm_position == "sandwich" else 2) + 2 * config.head_dim * config.qk_norm
    head = config.head_transform * (D * D + D + norm) + config.head_bias * V
    if config.norm_position != "post":
        head += norm
    return embeddings + config.num_layers * (norms + attention + mlp) + head


def largest_weight(config: TransformerConfig) -> int:
    """Elements of the largest single weight, with queries, keys and values fused, and gate with up."""
    D = config.hidden_size
    fused_attention = D * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    fused_mlp = D * config.ffn_size * (2 if config.gated_mlp else 1)
    positions = config.max_positions if config.positions == "learned" else 0
    return max(D * max(config.vocab_size, positions, config.token_types), fused_attention, fused_mlp)
