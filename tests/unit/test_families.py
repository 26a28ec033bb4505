import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RecipeError
from trainer.model.families import FAMILIES, count_parameters, largest_weight, to_hf_config, translate

GPT2 = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 50, "tie_word_embeddings": False, "activation_function": "gelu"}),
    ("llama", LLAMA),
    ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {**LLAMA, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
]


def hf_class(family: str, kind: str) -> Any:
    import transformers

    return getattr(transformers, {"gpt2": "GPT2", "llama": "Llama"}[family] + kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    theirs = hf_class(family, "Config")().to_dict()
    ours = to_hf_config(translate(family, {}), dtype="float32", eos_token_id=None)
    for name, rule in FAMILIES[family].keys.items():
        expected = theirs[name]
        if rule.default is None and expected is None:
            expected = {"n_inner": 4 * theirs.get("n_embd", 0)}[name]
        assert ours[name] == expected, name
    assert translate(family, {}) == translate(family, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_known(family: str) -> None:
    theirs = hf_class(family, "Config")().to_dict()
    assert set(theirs) <= set(FAMILIES[family].known)


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_transformers_loads_what_is_written_and_gives_it_back(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    config = translate(family, shape)
    written = to_hf_config(config, dtype="bfloat16", eos_token_id=5)
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = hf_class(family, "Config").from_pretrained(tmp_path)
    assert translate(family, loaded.to_dict()) == config
    assert translate(family, written) == config
    assert (loaded.eos_token_id, loaded.architectures) == (5, [FAMILIES[family].architecture])


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_parameters_are_counted_exactly(family: str, shape: dict[str, Any]) -> None:
    import torch

    config = translate(family, shape)
    hf_config = hf_class(family, "Config")(**to_hf_config(config, dtype="float32", eos_token_id=None))
    with torch.device("meta"):
        model = hf_class(family, "LMHeadModel" if family == "gpt2" else "ForCausalLM")(hf_config)
    model.tie_weights()
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert largest_weight(config) >= max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("spelling", [{"rope_theta": 7e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}])
def test_both_spellings_of_rope(spelling: dict[str, Any]) -> None:
    assert translate("llama", spelling).rope_theta == 7e4
    assert translate("llama", {"rope_scaling": None}).rope_theta == 1e4


def test_aliases_of_transformers() -> None:
    aliases = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    assert translate("gpt2", {"vocab_size": 97, **aliases}) == translate("gpt2", GPT2)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("gtp2", {}, "did you mean gpt2"),
        ("gpt2", {"n_emdb": 3}, 'unknown key "n_emdb" for family gpt2; did you mean n_embd?'),
        ("gpt2", {"n_embd": 25}, "n_embd = 25 is not a multiple of n_head = 12; nearest legal n_head: 5 or 25"),
        ("gpt2", {"n_embd": "24"}, 'n_embd = "24": must be a whole number'),
        ("gpt2", {"n_layer": 10**9}, "n_layer = 1000000000: must be 1 to 4096"),
        ("gpt2", {"vocab_size": -1}, "vocab_size = -1: must be 1 to"),
        ("gpt2", {"n_layer": True}, "n_layer = true: must be a whole number"),
        ("gpt2", {"resid_pdrop": 1.0}, "resid_pdrop = 1.0: must be a number in [0, 1)"),
        ("gpt2", {"activation_function": "relu"}, 'activation_function = "relu": must be one of gelu, gelu_new'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "is not supported by family gpt2 here; legal: false"),
        ("gpt2", {"n_embd": 24, "hidden_size": 24, "n_head": 4}, "two names of one value"),
        ("gpt2", {"model_type": "llama"}, 'model_type = "llama" is not supported by family gpt2 here; legal: "gpt2"'),
        ("llama", {"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ("llama", {"hidden_size": 96}, "rotary positions need an even head size"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling.rope_type = "linear" is not supported'),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2}}, "unknown key rope_parameters.factor"),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "give one of them"),
        ("llama", {"rope_theta": -1}, "rope_theta = -1: must be a number above 0"),
        ("llama", {"rope_parameters": {"rope_theta": [1]}}, "rope_parameters.rope_theta = [1]: must be a number above 0"),
        ("llama", {"pretraining_tp": 2}, "legal: 1"),
        ("llama", {"head_dim": 2.0}, "head_dim = 2.0: must be a whole number"),
    ],
)
def test_what_is_not_there_is_refused_by_name(family: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        translate(family, change)
    assert len(refused.value.lines) == 1
    assert said in refused.value.lines[0]


def test_all_faults_at_once() -> None:
    with pytest.raises(RecipeError) as refused:
        translate("llama", {"hidden_sise": 1, "num_hidden_layers": 0, "hidden_act": "relu", "mlp_bias": 1})
    assert len(refused.value.lines) == 4


def test_bookkeeping_changes_nothing() -> None:
    bookkeeping = {"torch_dtype": "float16", "transformers_version": "4.1", "architectures": ["X"], "use_cache": False}
    assert translate("gpt2", {**GPT2, **bookkeeping, "n_ctx": 3}) == translate("gpt2", GPT2)


def test_a_table_names_only_fields_that_exist_and_all_of_them() -> None:
    fields = {field.name for field in dataclasses.fields(translate("gpt2", {}))}
    for family in FAMILIES.values():
        derived = {"family", "rope_theta"} | {"num_kv_heads", "head_dim"}
        named = {name for rule in family.keys.values() for name in rule.fields} | set(family.constants)
        assert named <= fields <= named | derived
