"""The translation of a Hugging Face config to our network by its family's table, and back.

A key that the table does not have is refused by name: a config that asks for other mathematics must
not train a different network.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from trainer.errors import RecipeError
from trainer.model.config import RopeScaling, TransformerConfig
from trainer.model.families import FAMILIES, FIXED, PLAIN, ROPE_SCALINGS, ROPE_THETA, Family
from trainer.model.hf_keys import ACTIVATIONS, positive
from trainer.schema import Finding
from trainer.spelling import nearest


def from_hf(family: str, hf_config: Mapping[str, Any]) -> TransformerConfig:
    """Return the network that a Hugging Face config describes. RecipeError with a line for each
    mistake."""
    config, findings = read_config(family, hf_config)
    if config is None:
        raise RecipeError([finding.message for finding in findings])
    return config


def read_config(family: str, hf_config: Mapping[str, Any]) -> tuple[TransformerConfig | None, list[Finding]]:
    """Return the network, or None, and all findings, whose keys are Hugging Face's."""
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
    if not findings and spec.translates:
        findings.extend(_read_sides(spec, hf_config, values))
    if not findings and "feed_forward" in values:
        findings.extend(_read_feed_forward(hf_config, values))
        findings.extend(_read_head(values))
    if not findings:
        findings.extend(_window_findings(values))
        findings.extend(_relative_findings(values))
    if findings:
        return None, findings
    config = replace(_derive(spec, values), classes=classes_of(spec, hf_config))
    findings = list(_shape_findings(spec, config))
    return (None if findings else config), findings


def classes_of(family: Family, hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a classifier's classes in their order; () for another head."""
    names = hf_config.get("id2label")
    if family.classifier not in (hf_config.get("architectures") or ()) or not isinstance(names, Mapping):
        return ()
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _legal_families() -> str:
    return "legal: " + ", ".join(FAMILIES)


def _did_you_mean(word: str, names: list[str]) -> str:
    meant = nearest(word, names)
    return f"; did you mean {meant}?" if meant else ""


def _spelling(family: Family, name: str, hf_config: Mapping[str, Any]) -> str:
    """Return the spelling of `name` that the config uses."""
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


def _read_sides(family: Family, hf_config: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Finding]:
    """Set the number of all layers, and the vocabularies. Ours is the target's, whose words the
    model writes."""
    for name, of in family.equal.items():
        given, first = hf_config.get(name, family.keys[of].default), hf_config.get(of, family.keys[of].default)
        if given != first:
            message = f"{name} = {json.dumps(given)}, but {of} = {json.dumps(first)}: both sides have one size here; legal: "
            yield Finding((name, of), message + json.dumps(first))
    values["num_layers"] = values["encoder_layers"] + (values["decoder_layers"] or values["encoder_layers"])
    source, target = values["vocab_size"], values.get("target_vocab_size") or values["vocab_size"]
    if not values.get("shared_embedding", True):
        values |= {"vocab_size": target, "source_vocab_size": source}
    elif source != target:
        message = f"decoder_vocab_size = {target}, but the embedding is shared: share_encoder_decoder_embeddings false, or "
        yield Finding(("decoder_vocab_size", "vocab_size"), message + f"decoder_vocab_size {source}")


def _read_feed_forward(hf_config: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Finding]:
    """Set both values that T5 gives in one word, and check further keys that give them again."""
    values["gated_mlp"], values["activation"] = values["feed_forward"]
    for name, meant in (("is_gated_act", values["gated_mlp"]), ("dense_act_fn", values["activation"])):
        said = hf_config.get(name, meant)
        if (ACTIVATIONS.get(said, said) if isinstance(said, str) else said) != meant:
            message = f"{name} = {json.dumps(said)}, but feed_forward_proj is what counts: remove {name}"
            yield Finding((name, "feed_forward_proj"), message)


def _read_head(values: dict[str, Any]) -> Iterator[Finding]:
    """Set the scale of the head. T5 scales a tied head, and no other.

    For an untied head transformers 4 writes tie_word_embeddings false. transformers 5 writes true
    for both, and scale_decoder_outputs false for an untied one.
    """
    if values["scaled_head"] is None:
        values["scaled_head"] = values["tied_head"]
    elif not values["scaled_head"]:
        values["tied_head"] = False
    elif not values["tied_head"]:
        message = "scale_decoder_outputs = true, but tie_word_embeddings = false: a head of its own is not scaled; legal: false"
        yield Finding(("scale_decoder_outputs", "tie_word_embeddings"), message)


def _side_keys(config: TransformerConfig) -> dict[str, Any]:
    """Return layers and vocabularies of both sides by the names of their keys' fields; a family
    writes those that it has."""
    if not config.encoder_layers:
        return {}
    separate = config.source_vocab_size is not None
    return {
        "decoder_layers": config.num_layers - config.encoder_layers,
        "shared_embedding": not separate,
        "target_vocab_size": config.vocab_size,
        "vocab_size": config.source_vocab_size if separate else config.vocab_size,
    }


def _read_rope(family: Family, hf_config: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Finding]:
    """Set rope_theta and rope_scaling. transformers 5 writes rope_parameters, 4 wrote rope_theta
    and rope_scaling."""
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
    """Return the scaling that rope_parameters or rope_scaling (`name`) asks for, and the mistakes
    in it."""
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


def _relative_findings(values: Mapping[str, Any]) -> Iterator[Finding]:
    single = values["relative_buckets"] // 2
    if single and values["relative_distance"] <= single:
        name, buckets = "relative_attention_max_distance", "relative_attention_num_buckets"
        yield Finding(
            (name, buckets),
            f"{name} = {values['relative_distance']} is not beyond the {single} of {buckets} = {values['relative_buckets']} "
            f"that have one distance each; legal: {single + 1} or more",
        )


def _window_size(values: Mapping[str, Any]) -> int | None:
    return values.get("sliding_window") if values.get("use_sliding_window", True) else None


def _windows(family: Family, values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's window, by `layer_types` or the family's own rule."""
    window, listed, full_layers = _window_size(values), values.get("layer_types"), values.get("max_window_layers", 0)

    def slides(layer: int) -> bool:
        if listed is not None:
            return bool(listed[layer] == "sliding_attention")
        if family.windows == "last layers":
            return bool(layer >= full_layers)
        return family.windows == "every layer" or layer % 2 == 0

    return tuple(window if slides(layer) else None for layer in range(values["num_layers"]))


def _window_keys(config: TransformerConfig) -> dict[str, Any]:
    """Return the windows under Hugging Face's keys; a family writes those that it has."""
    sliding = [window is not None for window in config.windows]
    return {
        "sliding_window": next((window for window in config.windows if window is not None), None),
        "use_sliding_window": any(sliding),
        "max_window_layers": sliding.index(True) if any(sliding) else config.num_layers,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
    }


def _derive(family: Family, values: dict[str, Any]) -> TransformerConfig:
    """Return the network, with the values that a config may leave out: n_inner = 4 n_embd,
    key/value heads = heads, head_dim = D / H."""
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


def _generation_keys(end: int | None, start: int | None) -> dict[str, int | None]:
    """Return the special tokens of generation; a family writes those that it has.

    The token before a translation also fills up shorter ones.
    """
    return {"decoder_start_token_id": start, "pad_token_id": start, "forced_eos_token_id": end}


def to_hf(
    config: TransformerConfig,
    *,
    dtype: str,
    eos_token_id: int | None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    start_of_target: int | None = None,
) -> dict[str, Any]:
    """Return the config.json with which transformers loads exported weights. `dtype`: "float32",
    "bfloat16" or "float16". `start_of_target`: the token before a translation.

    Where no token begins texts, a model begins to write after the token that ends documents, as in
    GPT-2: in a packed row every document follows one. A model that sees both sides writes nothing.
    """
    family = FAMILIES[config.family]
    values = {**dataclasses.asdict(config), **_window_keys(config), **_side_keys(config)}
    values["feed_forward"] = (config.gated_mlp, config.activation)
    written = {name: rule.write(values[rule.fields[0]]) for name, rule in family.keys.items()}
    written |= {name: written[of] for name, of in family.equal.items()}
    if family.rope:
        # Both spellings: transformers 5 reads the first, older versions the second.
        scaling = _rope_scaling_keys(config.rope_scaling)
        written["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
        written["rope_theta"] = config.rope_theta
        if scaling:
            written["rope_scaling"] = scaling
    writes = config.causal or config.encoder_layers > 0
    generation = {
        name: token for name, token in _generation_keys(eos_token_id, start_of_target).items() if name in family.known
    }
    classes = {
        "id2label": {str(number): name for number, name in enumerate(config.classes)},
        "label2id": {name: number for number, name in enumerate(config.classes)},
    }
    return {
        "architectures": [family.classifier if config.classes else family.architecture],
        "model_type": family.name,
        "dtype": dtype,
        "bos_token_id": bos_token_id if bos_token_id is not None or not writes else eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        **(generation if family.translates else {}),
        "use_cache": True,
        **(classes if config.classes else {}),
        **written,
        **family.fixed,
    }


def _rope_scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    values = dataclasses.asdict(scaling)
    return {"rope_type": scaling.kind, **{name: values[rule.fields[0]] for name, rule in ROPE_SCALINGS[scaling.kind].items()}}
