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
class TransformerConfig:
    """What the network needs to know, in our names; sizes in elements, rates as probabilities."""

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
    positions: Literal["learned", "rope"]
    rope_theta: float
    activation: Literal["gelu", "gelu_tanh", "silu"]
    gated_mlp: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    norm_bias: bool
    tied_head: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    init_std: float
    scaled_residual_init: bool


# Reading a value: return it in our terms, or raise ValueError with what would be right.


@dataclass(frozen=True)
class Whole:
    """A size, 1 to `limit`. The limits are about ten times the largest published, so that a slip of the finger is
    refused at the door instead of filling the memory. `optional`: null stands for a value derived from others."""

    limit: int
    optional: bool = False

    def __call__(self, value: Any) -> int | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("a whole number")
        if not 1 <= value <= self.limit:
            raise ValueError(f"1 to {self.limit}")
        return value


def rate(value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError("a number in [0, 1)")
    return float(value)


def positive(value: Any) -> float:
    if not _is_number(value) or not 0.0 < value < float("inf"):
        raise ValueError("a number above 0")
    return float(value)


def standard_deviation(value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError("a number in [0, 1]")
    return float(value)


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

    `keys` translate; `aliases` are other spellings that transformers accepts; `ignored` changes nothing in training;
    `fixed` is accepted only with this value; `constants` are fields of TransformerConfig that the family never varies;
    `overridable` keys may differ from those of a pretrained folder, because no weight's shape or meaning depends on them.
    """

    name: str
    architecture: str
    keys: Mapping[str, Key]
    constants: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset(BOOKKEEPING.split())
    fixed: Mapping[str, Any] = field(default_factory=dict)
    overridable: frozenset[str] = frozenset()

    @property
    def rope(self) -> bool:
        return bool(self.constants["positions"] == "rope")

    @property
    def known(self) -> list[str]:
        """All accepted keys, those that do something first."""
        rope = ROPE_KEYS if self.rope else ()
        return [*self.keys, *rope, *self.aliases, *self.fixed, *FIXED, "model_type", *sorted(self.ignored)]


ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")
ROPE_THETA = 10_000.0

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
        "rope_theta": ROPE_THETA,
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

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    keys={
        "vocab_size": key("vocab_size", 32000, VOCABULARY),
        "hidden_size": key("hidden_size", 4096, HIDDEN),
        "intermediate_size": key("ffn_size", 11008, Whole(FFN.limit)),
        "num_hidden_layers": key("num_layers", 32, LAYERS),
        "num_attention_heads": key("num_heads", 32, HEADS),
        "num_key_value_heads": key("num_kv_heads", None, Whole(HEADS.limit, optional=True)),
        "head_dim": key("head_dim", None, Whole(2**14, optional=True)),
        "hidden_act": key("activation", "silu", activation, _activation_name),
        "max_position_embeddings": key("max_positions", 2048, POSITIONS),
        "initializer_range": key("init_std", 0.02, standard_deviation),
        "rms_norm_eps": key("norm_eps", 1e-6, positive),
        "tie_word_embeddings": key("tied_head", False, flag),
        "attention_bias": Key(("qkv_bias", "attention_out_bias"), False, flag),
        "attention_dropout": key("attention_dropout", 0.0, rate),
        "mlp_bias": key("mlp_bias", False, flag),
    },
    constants={
        "norm": "rmsnorm",
        "norm_bias": False,
        "positions": "rope",
        "gated_mlp": True,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "scaled_residual_init": False,
    },
    fixed={"pretraining_tp": 1, "partial_rotary_factor": 1.0},
    overridable=frozenset(("attention_dropout",)),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (GPT2, LLAMA)})


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
    values: dict[str, Any] = dict(spec.constants)
    for name, rule in spec.keys.items():
        given = _spelling(spec, name, hf_config)
        try:
            value = rule.read(hf_config.get(given, rule.default))
        except ValueError as error:
            findings.append(Finding((given,), f"{given} = {json.dumps(hf_config[given])}: must be {error}"))
            continue
        values.update(dict.fromkeys(rule.fields, value))
    if spec.rope:
        theta, wrong = _rope_theta(hf_config)
        values["rope_theta"] = theta
        findings.extend(wrong)
    if findings:
        return None, findings
    config = _derive(family, values)
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


def _rope_theta(hf_config: Mapping[str, Any]) -> tuple[float, list[Finding]]:
    """The base of the rotary angles: transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling."""
    findings = []
    thetas: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        block = hf_config.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            findings.append(Finding((name,), f"{name} = {json.dumps(block)}: must be an object or null"))
            continue
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            findings.append(Finding((name,), f'{name}.rope_type = {json.dumps(kind)} is not supported; legal: "default"'))
            continue
        if "rope_theta" in block:
            thetas[f"{name}.rope_theta"] = block["rope_theta"]
        if block.get("partial_rotary_factor", 1.0) != 1.0:
            findings.append(Finding((name,), f"{name}.partial_rotary_factor is not supported; legal: 1.0"))
        extra = sorted(block.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        findings.extend(Finding((name,), f"unknown key {name}.{k} for rope_type default") for k in extra)
    if hf_config.get("rope_theta") is not None:
        thetas["rope_theta"] = hf_config["rope_theta"]
    for name, theta in thetas.items():
        try:
            positive(theta)
        except ValueError as error:
            findings.append(Finding((name.split(".")[0],), f"{name} = {json.dumps(theta)}: must be {error}"))
    if not findings and len(set(thetas.values())) > 1:
        said = " but ".join(f"{name} = {json.dumps(theta)}" for name, theta in thetas.items())
        findings.append(Finding((next(iter(thetas)).split(".")[0],), f"{said}: give one of them"))
    theta = next(iter(thetas.values()), ROPE_THETA)
    return (ROPE_THETA if findings else float(theta)), findings


def _derive(family: str, values: dict[str, Any]) -> TransformerConfig:
    """Fill in what a config may leave to others: n_inner = 4 n_embd, key/value heads = heads, head_dim = D / H."""
    if values["ffn_size"] is None:
        values["ffn_size"] = 4 * values["hidden_size"]
    if values.get("num_kv_heads") is None:
        values["num_kv_heads"] = values["num_heads"]
    if values.get("head_dim") is None:
        values["head_dim"] = max(1, values["hidden_size"] // values["num_heads"])
    return TransformerConfig(family=family, **values)


def _hf_name(family: Family, our_field: str) -> str:
    return next(name for name, rule in family.keys.items() if our_field in rule.fields)


def _shape_findings(family: Family, config: TransformerConfig) -> Iterator[Finding]:
    hidden, heads = _hf_name(family, "hidden_size"), _hf_name(family, "num_heads")
    D, H, KV = config.hidden_size, config.num_heads, config.num_kv_heads
    if D % H:
        legal = _divisors_near(D, H)
        yield Finding((heads, hidden), f"{hidden} = {D} is not a multiple of {heads} = {H}; nearest legal {heads}: {legal}")
    if H % KV:
        kv_heads = _hf_name(family, "num_kv_heads")
        legal = _divisors_near(H, KV)
        yield Finding(
            (kv_heads, heads), f"{heads} = {H} is not a multiple of {kv_heads} = {KV}; nearest legal {kv_heads}: {legal}"
        )
    if family.rope and config.head_dim % 2 and not D % H:
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
    values = dataclasses.asdict(config)
    written = {name: rule.write(values[rule.fields[0]]) for name, rule in family.keys.items()}
    if family.rope:
        # Both spellings: transformers 5 reads the first, older readers the second.
        written["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        written["rope_theta"] = config.rope_theta
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
    return embeddings + config.num_layers * (2 * norm + attention + mlp) + norm


def largest_weight(config: TransformerConfig) -> int:
    """Elements of the largest single weight, with queries, keys and values fused, and gate with up."""
    D = config.hidden_size
    fused_attention = D * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    fused_mlp = D * config.ffn_size * (2 if config.gated_mlp else 1)
    positions = D * config.max_positions if config.positions == "learned" else 0
    return max(D * config.vocab_size, fused_attention, fused_mlp, positions)
