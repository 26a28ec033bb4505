import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.shapes import BERT
from trainer.costs.blocks import count_parameters
from trainer.costs.flops import matmul_weights, training_flops
from trainer.errors import RecipeError
from trainer.model.config import RopeScaling, TransformerConfig
from trainer.model.families import FAMILIES, PLAIN
from trainer.model.hf_config import from_hf, to_hf

GPT2 = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
MANY_HEADS = {"hidden_size": 28, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}
GEMMA2 = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 10}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 50, "tie_word_embeddings": False, "activation_function": "gelu"}),
    ("llama", LLAMA),
    ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {**LLAMA, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}),
    ("llama", {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5}),
    ("mistral", LLAMA),
    ("mistral", {**LLAMA, **MANY_HEADS, "sliding_window": 1, "tie_word_embeddings": True}),
    ("mistral", {**LLAMA, "sliding_window": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ("qwen2", LLAMA),
    ("qwen2", {**LLAMA, **WINDOWS, "max_window_layers": 2, "tie_word_embeddings": True}),
    ("qwen2", {**LLAMA, **WINDOWS, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen3", {**LLAMA, "head_dim": 8}),
    ("qwen3", {**LLAMA, **MANY_HEADS, **WINDOWS, "max_window_layers": 0, "attention_bias": True}),
    ("phi3", LLAMA),
    ("phi3", {**LLAMA, "sliding_window": 7, "tie_word_embeddings": True, "resid_pdrop": 0.25}),
    ("gemma2", GEMMA2),
    ("gemma2", {**GEMMA2, "sliding_window": 7, "tie_word_embeddings": False, "attention_bias": True}),
    ("gemma2", {**GEMMA2, "layer_types": ["full_attention"] * 3, "attn_logit_softcapping": None}),
    ("gemma2", {**GEMMA2, "final_logit_softcapping": None, "query_pre_attn_scalar": 144, "hidden_activation": "silu"}),
    ("bert", BERT),
    ("bert", {**BERT, "type_vocab_size": 5, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.25}),
    ("bert", {**BERT, "vocab_size": 3, "type_vocab_size": 200, "attention_probs_dropout_prob": 0.0}),
]


def hf_class(family: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family]


def hf_model(config: TransformerConfig) -> Any:
    """The same network in transformers, shapes only."""
    import torch
    import transformers

    hf_config = hf_class(config.family)(**to_hf(config, dtype="float32", eos_token_id=None))
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[config.family].architecture)(hf_config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    theirs = hf_class(family)().to_dict()
    ours = to_hf(from_hf(family, {}), dtype="float32", eos_token_id=None)
    for name, rule in FAMILIES[family].keys.items():
        expected = theirs[name]
        if name == "max_window_layers":
            continue  # without windows it means nothing; what it does is in the SHAPES
        if rule.default is None and expected is None:
            derived = {
                "n_inner": 4 * theirs.get("n_embd", 0),
                "head_dim": 128,
                "sliding_window": None,
                "classifier_dropout": None,
            }
            expected = derived[name]
        assert ours[name] == expected, name
    assert from_hf(family, {}) == from_hf(family, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_known(family: str) -> None:
    theirs = hf_class(family)().to_dict()
    assert set(theirs) <= set(FAMILIES[family].known)


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_transformers_loads_what_is_written_and_gives_it_back(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    config = from_hf(family, shape)
    written = to_hf(config, dtype="bfloat16", eos_token_id=5)
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = hf_class(family).from_pretrained(tmp_path)
    assert from_hf(family, loaded.to_dict()) == config
    assert from_hf(family, written) == config
    assert (loaded.eos_token_id, loaded.architectures) == (5, [FAMILIES[family].architecture])


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_parameters_are_counted_exactly(family: str, shape: dict[str, Any]) -> None:
    config = from_hf(family, shape)
    model = hf_model(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert config.largest_weight >= max(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_the_weights_that_tokens_are_multiplied_with(family: str, shape: dict[str, Any]) -> None:
    config = from_hf(family, shape)
    model = hf_model(config)
    embeddings = {"model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    embeddings |= {f"bert.embeddings.{what}_embeddings.weight" for what in ("word", "position", "token_type")}
    matrices = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2}
    assert sum(numel for name, numel in matrices.items() if name not in embeddings) == matmul_weights(config)


def test_windowed_attention_is_counted_by_its_window() -> None:
    """A token attends to min(place + 1, window) tokens; counting by areas leaves out half of the diagonal's n or w."""
    full = from_hf("qwen3", {**LLAMA, "head_dim": 8})
    late = from_hf("qwen3", {**LLAMA, "head_dim": 8, **WINDOWS, "max_window_layers": 2})  # the last of 3 layers
    every = from_hf("qwen3", {**LLAMA, "head_dim": 8, **WINDOWS, "max_window_layers": 0})
    per_pair = 12 * full.num_heads * full.head_dim  # forward and backward of Q Kᵀ and P V
    for length in (1, 4, 5, 6, 23):
        attended = sum(min(place + 1, 5) for place in range(length))
        doubled_area = 2 * attended - min(length, 5)
        saved = per_pair * (length**2 - doubled_area) // 2
        assert training_flops(full, [length]) - training_flops(late, [length]) == saved
        assert training_flops(full, [length, 2]) - training_flops(every, [length, 2]) == 3 * saved


@pytest.mark.parametrize("spelling", [{"rope_theta": 7e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}])
def test_both_spellings_of_rope(spelling: dict[str, Any]) -> None:
    assert from_hf("llama", spelling).rope_theta == 7e4
    assert from_hf("llama", {"rope_scaling": None}).rope_theta == 1e4


SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 512)


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_scaling": LLAMA3_ROPE, "rope_theta": 7e4}, 7e4, SCALING),
        ({"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 7e4}}, 7e4, SCALING),
        ({"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 7e4}, "rope_theta": 7e4, "rope_scaling": LLAMA3_ROPE}, 7e4, SCALING),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling("linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, 1e4, RopeScaling("linear", 2.5)),
        ({"rope_parameters": {}, "rope_scaling": None}, 1e4, None),
    ],
)
def test_both_spellings_of_rope_scaling(config: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    network = from_hf("llama", config)
    assert (network.rope_theta, network.rope_scaling) == (theta, scaling)


def test_llama3_scaling_starts_from_the_positions_when_it_says_no_other() -> None:
    rope = {name: value for name, value in LLAMA3_ROPE.items() if name != "original_max_position_embeddings"}
    scaling = from_hf("llama", {"max_position_embeddings": 640, "rope_parameters": rope}).rope_scaling
    assert scaling is not None
    assert scaling.original_positions == 640


W = 5
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "config", "windows"),
    [
        ("mistral", {}, (4096,) * 3),
        ("mistral", {"sliding_window": None}, (None,) * 3),
        ("phi3", {}, (None,) * 3),
        ("phi3", {"sliding_window": W}, (W,) * 3),
        ("qwen2", {"sliding_window": W}, (None,) * 3),
        ("qwen2", WINDOWS, (None,) * 3),
        ("qwen2", {**WINDOWS, "sliding_window": None}, (None,) * 3),
        ("qwen2", {**WINDOWS, "max_window_layers": 1}, (None, W, W)),
        ("qwen3", {**WINDOWS, "max_window_layers": 0, "layer_types": [FULL, SLIDING, FULL]}, (None, W, None)),
        ("qwen3", {"layer_types": [FULL] * 3}, (None,) * 3),
        ("gemma2", {}, (4096, None, 4096)),
        ("gemma2", {"sliding_window": W, "layer_types": [FULL, FULL, SLIDING]}, (None, None, W)),
        ("llama", {}, (None,) * 3),
        ("gpt2", {}, (None,) * 3),
        ("bert", {}, (None,) * 3),
    ],
)
def test_which_layers_have_a_window(family: str, config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    assert from_hf(family, {**config, layers: 3}).windows == windows


def test_what_older_gemma_folders_say_twice() -> None:
    twice = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window_size": 4096}
    assert from_hf("gemma2", {**twice, "cache_implementation": "hybrid"}) == from_hf("gemma2", {})


def test_aliases_of_transformers() -> None:
    aliases = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    assert from_hf("gpt2", {"vocab_size": 97, **aliases}) == from_hf("gpt2", GPT2)


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
        ("gpt2", {"activation_function": "tanh"}, 'activation_function = "tanh": must be one of gelu, gelu_new'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "is not supported by family gpt2 here; legal: false"),
        ("gpt2", {"n_embd": 24, "hidden_size": 24, "n_head": 4}, "two names of one value"),
        ("gpt2", {"model_type": "llama"}, 'model_type = "llama" is not supported by family gpt2 here; legal: "gpt2"'),
        ("llama", {"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ("llama", {"hidden_size": 96}, "rotary positions need an even head size"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, 'rope_scaling.rope_type = "dynamic" is not supported'),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, 'legal: "default", "linear", "llama3"'),
        ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, 'rope_scaling.rope_type = ["linear"] is not supported'),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = null: must be a number of at least 1"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5: must be a number of at"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2, "betta": 1}},
            "unknown key rope_scaling.betta for rope_type",
        ),
        (
            "llama",
            {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4}},
            "high_freq_factor must be above low_freq_factor = 4",
        ),
        ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default"}}, "disagree: give one of them"),
        ("llama", {"rope_scaling": 3}, "rope_scaling = 3: must be an object or null"),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5 is not supported by family llama here; legal: 1.0",
        ),
        ("llama", {"sliding_window": 5}, 'unknown key "sliding_window" for family llama'),
        ("llama", {"head_dim": 7}, "head_dim = 7: rotary positions need an even head size"),
        ("llama", {"hidden_size": 4095, "head_dim": 8}, "hidden_size = 4095 is not a multiple of num_attention_heads = 32"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be 1 to"),
        ("mistral", {"layer_types": []}, 'unknown key "layer_types" for family mistral'),
        ("mistral", {"attention_bias": True}, 'unknown key "attention_bias" for family mistral'),
        ("qwen2", {"use_mrope": True}, "use_mrope = true is not supported by family qwen2 here; legal: false"),
        ("qwen2", {"num_hidden_layers": 2, "layer_types": [FULL]}, "layer_types lists 1 layers, num_hidden_layers = 2"),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": [SLIDING]}, "sliding_attention, but use_sliding_window = false"),
        ("qwen3", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "one of full_attention, sliding_attention"),
        ("qwen3", {"max_window_layers": -1}, "max_window_layers = -1: must be 0 to"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, 'rope_type = "longrope" is not supported by family phi3 here'),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, 'legal: "default"'),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported; legal: 1.0"),
        ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop = 0.1 is not supported by family phi3 here; legal: 0.0"),
        ("gemma2", {"hidden_act": "gelu"}, 'hidden_act = "gelu", but hidden_activation = "gelu_pytorch_tanh" is what counts'),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not supported"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping = 0: must be a number above 0"),
        ("gemma2", {"query_pre_attn_scalar": 2.5}, "query_pre_attn_scalar = 2.5: must be a whole number"),
        ("gemma2", {"sliding_window": None}, "sliding_window = null: must be a whole number"),
        ("bert", {"is_decoder": True}, "is_decoder = true is not supported by family bert here; legal: false"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention = true is not supported by family bert here"),
        ("bert", {"chunk_size_feed_forward": 4}, "chunk_size_feed_forward = 4 is not supported by family bert here"),
        ("bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type = "relative_key" is not supported'),
        (
            "bert",
            {"tie_word_embeddings": False},
            "tie_word_embeddings = false is not supported by family bert here; legal: true",
        ),
        ("bert", {"hidden_act": "tanh"}, 'hidden_act = "tanh": must be one of gelu, gelu_new'),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size = 0: must be 1 to 1024"),
        ("bert", {"hidden_size": 770}, "hidden_size = 770 is not a multiple of num_attention_heads = 12"),
        ("bert", {"embedding_size": 128}, 'unknown key "embedding_size" for family bert'),
        ("bert", {"num_key_value_heads": 2}, 'unknown key "num_key_value_heads" for family bert'),
        ("t5", {"encoder_layers": 2}, 'unknown key "encoder_layers" for family t5'),
        ("t5", {"num_layers": 0}, "num_layers = 0: must be 1 to 4096"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder = false is not supported by family t5 here; legal: true"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, 'feed_forward_proj = "gated-tanh": must be one of gelu, gelu_new'),
        ("t5", {"is_gated_act": True}, "is_gated_act = true, but feed_forward_proj is what counts: remove is_gated_act"),
        ("t5", {"dense_act_fn": "gelu_new"}, 'dense_act_fn = "gelu_new", but feed_forward_proj is what counts'),
        ("t5", {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets = 3: must be 4 to"),
        (
            "t5",
            {"relative_attention_max_distance": 16},
            "relative_attention_max_distance = 16 is not beyond the 16 of relative_attention_num_buckets = 32",
        ),
        (
            "t5",
            {"tie_word_embeddings": False, "scale_decoder_outputs": True},
            "scale_decoder_outputs = true, but tie_word_embeddings = false",
        ),
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
        from_hf(family, change)
    assert len(refused.value.lines) == 1
    assert said in refused.value.lines[0]


def test_the_config_of_the_first_checkpoints_of_bert() -> None:
    """bert-base-multilingual-cased, apart from its sizes."""
    pooler = {"fc_size": 768, "num_attention_heads": 12, "num_fc_layers": 3, "size_per_head": 128, "type": "first_token"}
    older = {f"pooler_{name}": value for name, value in pooler.items()} | {"directionality": "bidi", "model_type": "bert"}
    older |= {"position_embedding_type": "absolute", "gradient_checkpointing": False, "architectures": ["BertForMaskedLM"]}
    assert from_hf("bert", {**BERT, **older}) == from_hf("bert", BERT)


def test_all_faults_at_once() -> None:
    with pytest.raises(RecipeError) as refused:
        from_hf("llama", {"hidden_sise": 1, "num_hidden_layers": 0, "hidden_act": "tanh", "mlp_bias": 1})
    assert len(refused.value.lines) == 4


def test_bookkeeping_changes_nothing() -> None:
    bookkeeping = {"torch_dtype": "float16", "transformers_version": "4.1", "architectures": ["X"], "use_cache": False}
    assert from_hf("gpt2", {**GPT2, **bookkeeping, "n_ctx": 3}) == from_hf("gpt2", GPT2)


def test_a_table_names_only_fields_that_exist_and_all_of_them() -> None:
    fields = {field.name for field in dataclasses.fields(from_hf("gpt2", {}))}
    for family in FAMILIES.values():
        derived = {"family", "num_layers", "num_kv_heads", "head_dim", "activation", "windows", "classes", "new_tokens"}
        says_windows = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
        says_others = {"decoder_layers", "shared_embedding", "target_vocab_size", "feed_forward"}
        named = {name for rule in family.keys.values() for name in rule.fields} - says_windows - says_others | set(
            family.constants
        )
        assert named <= fields <= named | derived | set(PLAIN)
        assert set(family.echoes.values()) <= set(family.keys)
