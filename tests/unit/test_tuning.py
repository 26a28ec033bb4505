"""Tuning without ranks: which modules the words mean, how many weights are trained, what the step costs."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import nn

from parallel.documents import Documents
from parallel.low_rank import InputDropout, LowRank
from parallel.mesh import Group
from parallel.params import draw, initialise, owned_specs
from parallel.rng import Streams
from parallel.tensor import TensorParallel
from tests.unit.stages import whole_model
from trainer.checkpoint.facts import recipe_facts, refusals
from trainer.costs.flops import matmul_weights, training_flops
from trainer.data.loader import MicroBatch
from trainer.engine.parameter_counts import ParameterCounts
from trainer.model.blocks import blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import assembled
from trainer.model.transformer import Stage
from trainer.schema import RankBudget, Recipe, Tuning
from trainer.tuning.builders import BUILDERS, lora_scale
from trainer.tuning.merge import merged
from trainer.tuning.methods import METHODS
from trainer.tuning.peft_format import adapter_config
from trainer.tuning.rank_budget import budget_after
from trainer.tuning.targets import is_added, parts_of, target_modules, targeted_modules

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LLAMA = from_hf("llama", {"vocab_size": 67, **SIZES})
PHI3 = from_hf("phi3", {"vocab_size": 67, **SIZES})
GPT2 = from_hf("gpt2", {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16})


@pytest.mark.parametrize(
    ("config", "targets", "expected"),
    [
        (LLAMA, ["attention"], ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (LLAMA, ["q", "down"], ["down_proj", "q_proj"]),
        (PHI3, ["attention", "mlp"], ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        (GPT2, ["attention", "mlp"], ["c_attn", "c_fc", "c_proj"]),
        (GPT2, ["attention"], ["attn.c_proj", "c_attn"]),  # the MLP's c_proj is another
        (GPT2, ["down"], ["mlp.c_proj"]),
    ],
)
def test_peft_is_told_which_modules_are_meant(config: object, targets: list[str], expected: list[str]) -> None:
    assert target_modules(Tuning(method="lora", targets=targets), config) == expected


def test_rescaled_inputs_are_told_apart() -> None:
    recipe = Recipe.model_validate({"tuning": {"method": "ia3", "targets": ["attention", "down"]}})
    config = adapter_config(recipe, GPT2)
    assert config["peft_type"] == "IA3"
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert config["feedforward_modules"] == ["c_proj"]
    config = adapter_config(Recipe.model_validate({"tuning": {"method": "ia3"}}), LLAMA)
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "adapter"])
@pytest.mark.parametrize("network", [LLAMA, GPT2])
def test_a_merged_stream_has_the_models_own_names(method: str, network: TransformerConfig) -> None:
    """Parts may come after their weights, and biases that nobody scales pass through."""
    tuning = Tuning(method=method, targets=["attention", "mlp"])
    stage = whole_model(network, tuning, "cpu", lambda block: initialise(block, seed=0))
    specs = [(spec, parameter.detach()) for _, parameter, spec in owned_specs(stage)]
    before = dict(assembled(specs))
    after = dict(merged(assembled(specs), tuning=tuning, network=network))
    assert list(after) != []
    assert after.keys() == {name for name in before if not is_added(name)}
    for name, tensor in after.items():
        # Every method starts where the model is: B = 0, lengths as they are, scales 1.
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
@pytest.mark.parametrize("network", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_merged_model_is_the_adapted_one(method: str, network: TransformerConfig) -> None:
    """Every weight at random, biases too, which start at 0."""
    tuning, stream = Tuning(method=method, targets=["attention", "mlp"]), torch.Generator().manual_seed(0)
    adapted = whole_model(network, tuning, "cpu", lambda block: initialise(block, seed=0))
    with torch.no_grad():
        for _, parameter, _ in owned_specs(adapted):
            parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.1)
    specs = [(spec, parameter.detach()) for _, parameter, spec in owned_specs(adapted)]
    tensors = dict(merged(assembled(specs), tuning=tuning, network=network))

    def fill(block: nn.Module) -> None:
        for _, parameter, spec in owned_specs(block):
            for piece in spec.pieces:
                piece.in_parameter(parameter.data).copy_(piece.box_of(tensors[piece.name]))

    plain = whole_model(network, Tuning(), "cpu", fill)
    tokens, documents = torch.arange(12).view(1, 12), Documents(((12,),))
    # fp32, two orders of sums.
    torch.testing.assert_close(
        plain(tokens, batch=MicroBatch(tokens, documents), output="logits"),
        adapted(tokens, batch=MicroBatch(tokens, documents), output="logits"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_every_layer_is_adapted_in_the_order_of_the_model() -> None:
    modules = targeted_modules(Tuning(method="lora", targets=["o", "v"]), LLAMA)
    assert modules == [f"model.layers.{layer}.self_attn.{module}" for layer in (0, 1) for module in ("v_proj", "o_proj")]


def test_scaling_is_that_of_the_papers() -> None:
    assert lora_scale(Tuning(method="lora", rank=64, alpha=32.0)) == 0.5
    assert lora_scale(Tuning(method="lora", rank=64, alpha=32.0, rank_stabilized=True)) == 4.0


def test_the_first_factor_starts_as_kaiming_uniform_makes_it() -> None:
    """With a = √5 its bound is √(6 / ((1 + 5) · I)) (He et al. 2015, arXiv:1502.01852)."""
    assert LowRank(4, 1.0).first_factor(64).bound == pytest.approx(math.sqrt(6.0 / ((1.0 + 5.0) * 64)))
    start = LowRank(200, 1.0).first_factor(64)
    drawn = draw("a", (200, 64), start, seed=0)
    assert float(drawn.abs().max()) == pytest.approx(0.125, rel=1e-3)
    assert float(drawn.std()) == pytest.approx(0.125 / math.sqrt(3), rel=0.02)
    assert not torch.equal(drawn, draw("b", (200, 64), start, seed=0))


def test_each_module_drops_inputs_of_its_own() -> None:
    x, streams = torch.ones(8, 64), Streams((1,))
    one, again, other = (InputDropout(name, 0.5, 64, slice(None))(x, streams, slice(0, 8), 8) for name in ("q", "q", "k"))
    assert torch.equal(one, again)
    # 512 unrelated elements agree 256 times by chance; the bounds are 5 standard deviations.
    assert abs(int((one == other).sum()) - 256) < 5 * 128**0.5
    assert torch.equal(InputDropout("q", 0.5, 64, slice(None))(x, None, slice(0, 8), 8), x)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_only_what_the_factors_see_is_dropped(method: str) -> None:
    """They start by adding nothing, so that what is dropped changes nothing either; until something is learned."""
    tuning = Tuning(method=method, targets=["attention", "mlp"], dropout=0.5)
    stage = whole_model(LLAMA, tuning, "cpu", lambda block: initialise(block, seed=0))
    tokens, documents = torch.arange(12).view(1, 12), Documents(((12,),))
    assert torch.equal(
        stage(tokens, batch=MicroBatch(tokens, documents, streams=Streams((1,))), output="logits"),
        stage(tokens, batch=MicroBatch(tokens, documents), output="logits"),
    )
    with torch.no_grad():
        for _, parameter, spec in owned_specs(stage):
            if spec.added:
                parameter.add_(0.1)
    assert not torch.equal(
        stage(tokens, batch=MicroBatch(tokens, documents, streams=Streams((1,))), output="logits"),
        stage(tokens, batch=MicroBatch(tokens, documents), output="logits"),
    )


@pytest.mark.parametrize(("warmup", "final", "every"), [(0, 1, 1), (3, 5, 1), (2, 4, 3), (0, 9, 5)])
def test_ranks_come_down_as_peft_lets_them(warmup: int, final: int, every: int) -> None:
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    steps, modules = 20, 7
    names = {"init_r": 6, "target_r": 2, "tinit": warmup, "tfinal": final, "deltaT": every, "total_step": steps}
    module = nn.Module()
    for index in range(modules):
        module.register_module(f"m{index}", nn.Module())
        getattr(module, f"m{index}").lora_A = nn.ParameterDict({"default": torch.zeros(6, 3)})
    allocator = RankAllocator(module, AdaLoraConfig(**names), "default")
    keys = RankBudget(target_rank=2, warmup_steps=warmup, final_steps=final, every=every)
    for step in range(steps - final):
        budget, allocates = allocator.budget_schedule(step)
        assert budget_after(step, keys, steps, modules=modules, rank=6) == (budget if allocates else None)
    # Then peft masks once more, whatever the interval, and leaves it at that.
    assert budget_after(steps - final, keys, steps, modules=modules, rank=6) == 2 * modules
    assert all(budget_after(step, keys, steps, modules=modules, rank=6) is None for step in range(steps - final + 1, steps))


def test_what_is_trained_is_counted_apart() -> None:
    tuning = Tuning(method="lora", targets=["q", "down"], rank=4)
    stage = whole_model(LLAMA, tuning, "meta", lambda block: None)
    counts = ParameterCounts.of([(p, spec) for _, p, spec in owned_specs(stage)], Group.alone(), torch.device("cpu"))
    of_layer = 4 * (32 + 32) + 4 * (48 + 32)
    assert counts.trained == counts.trained_beside == 2 * of_layer
    assert counts.frozen_bytes == 4 * counts.frozen
    # A frozen weight costs its forward and its input's gradient, one beside it its own gradient too.
    frozen = training_flops(LLAMA, [10], trained_beside=counts.trained)
    whole = training_flops(LLAMA, [10])
    assert frozen - whole == 10 * (6 * counts.trained - 2 * matmul_weights(LLAMA))


def test_a_run_without_tuning_has_no_census_of_frozen_weights() -> None:
    stage = Stage(
        LLAMA,
        blocks_of(LLAMA),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("meta"),
        fill=lambda block: None,
    )
    counts = ParameterCounts.of([(p, spec) for _, p, spec in owned_specs(stage)], Group.alone(), torch.device("cpu"))
    assert (counts.frozen, counts.trained_beside) == (0, None)


@pytest.mark.parametrize(
    ("change", "refused"),
    [({"rank": 8}, "tuning.rank"), ({"targets": ["q"]}, "tuning.targets"), ({"dropout": 0.5}, None), ({"merge": True}, None)],
)
def test_what_a_checkpoint_of_an_adapter_can_be_gone_on_with(change: dict[str, object], refused: str | None) -> None:
    tuning = {"method": "lora", "rank": 4}
    saved, given = (recipe_facts(Recipe.model_validate({"tuning": keys})) for keys in (tuning, {**tuning, **change}))
    lines = refusals("c", 1, saved, given, ())
    assert [line.partition(":")[0] for line in lines] == ([refused] if refused else [])


def test_a_checkpoint_of_all_weights_does_not_go_on_as_an_adapter() -> None:
    saved, given = recipe_facts(Recipe()), recipe_facts(Recipe.model_validate({"tuning": {"method": "lora"}}))
    (line,) = refusals("c", 1, saved, given, ())
    assert line.startswith('tuning.method: c was saved with null, this run has "lora": it is another model')


def test_every_method_has_its_rows() -> None:
    """A name of the recipe is a row without torch and, where something is put beside a layer, one with it."""
    (names,) = (get_args(option) for option in get_args(Tuning.model_fields["method"].annotation) if get_args(option))
    assert list(names) == list(METHODS)
    assert set(BUILDERS) == {name for name, method in METHODS.items() if method.parts}
    for name, builder in BUILDERS.items():
        layers = [layer for layer in (builder.column, builder.row) if layer is not None]
        assert layers
        assert all((layer.merged is not None) == METHODS[name].merges for layer in layers)


@pytest.mark.parametrize("method", BUILDERS)
@pytest.mark.parametrize("network", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_what_is_beside_a_module_is_what_its_row_says(method: str, network: TransformerConfig) -> None:
    tuning = Tuning(method=method, targets=["attention", "mlp"])
    stage = whole_model(network, tuning, "meta", lambda block: None)
    added = {piece.name for _, _, spec in owned_specs(stage) if spec.added for piece in spec.pieces}
    assert added == {part for module in targeted_modules(tuning, network) for part in parts_of(tuning, module)}


def only_with(key: str) -> list[str]:
    """The methods with which the schema lets a key of tuning be written."""
    return Tuning.model_json_schema()["properties"][key]["only"]["tuning.method"]


def test_the_schema_says_what_the_rows_say() -> None:
    assert only_with("merge") == [name for name, method in METHODS.items() if method.merges]
    assert only_with("targets") == [name for name, method in METHODS.items() if method.words]
