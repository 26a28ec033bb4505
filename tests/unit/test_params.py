"""Parameters know what they are, and begin alike in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.mesh import Group
from parallel.params import (
    Init,
    Piece,
    Role,
    Sharded,
    draw,
    initialise,
    materialise,
    owned_specs,
    whole,
)
from parallel.rng import derive_seed
from parallel.tensor import TensorParallel
from trainer.costs.blocks import count_parameters
from trainer.model.blocks import blocks_of
from trainer.model.hf_config import from_hf
from trainer.model.transformer import Stage, logical_specs

# 67 symbols do not divide by 2 or 4: the last rank holds padding.
LLAMA = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "mlp_bias": True,
}
GPT2 = {"vocab_size": 67, "n_positions": 17, "n_embd": 24, "n_layer": 2, "n_head": 4}
BERT = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = [
    ("llama", LLAMA),
    ("llama", {**LLAMA, "tie_word_embeddings": True}),
    ("llama", {**LLAMA, "num_key_value_heads": 1}),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "vocab_size": 3, "tie_word_embeddings": False}),
    ("bert", {**BERT, "vocab_size": 5}),
]


def stage(family: str, shape: dict[str, Any], *, tp: int = 1, rank: int = 0, seed: int = 5) -> Stage:
    """One tensor rank's model; building and initialising it needs no communication."""
    config = from_hf(family, shape)
    return Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel(Group(rank=rank, ranks=tuple(range(tp)), handle=None), sequence=tp > 1),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed),
    )


def logical(stages: list[Stage]) -> dict[str, Tensor]:
    """The logical tensors that all ranks hold together; each element must be held once, or alike by all ranks."""
    tensors: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for model in stages:
        for name, parameter, spec in owned_specs(model):
            assert parameter.shape[0] >= sum(piece.rows for piece in spec.pieces), name
            assert not parameter[sum(piece.rows for piece in spec.pieces) :].any(), f"{name}: padding must be 0"
            for piece in spec.pieces:
                box = piece.box_of(tensors.setdefault(piece.name, torch.full(piece.shape, torch.nan)))
                if not spec.owned:
                    assert torch.equal(box, piece.in_parameter(parameter)), f"{name} differs between ranks"
                    continue
                box.copy_(piece.in_parameter(parameter))
                piece.box_of(held.setdefault(piece.name, torch.zeros(piece.shape))).add_(1)
    for name, times in held.items():
        assert (times == 1).all(), f"{name}: elements are held {times.unique().tolist()} times"
    return tensors


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("family", "shape"), MODELS)
def test_initial_weights_are_the_same_bits_at_every_tensor_degree(family: str, shape: dict[str, Any], tp: int) -> None:
    expected = logical([stage(family, shape)])
    got = logical([stage(family, shape, tp=tp, rank=rank) for rank in range(tp)])
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert sum(tensor.numel() for tensor in expected.values()) == count_parameters(from_hf(family, shape))


@pytest.mark.parametrize(("family", "shape"), MODELS)
def test_no_element_is_left_as_the_memory_was(family: str, shape: dict[str, Any]) -> None:
    """Padding rows of the vocabulary included: a NaN there would reach the softmax."""
    model = stage(family, shape, tp=4, rank=3)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    initialise(model, seed=5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_transposed_piece_lies_in_the_parameter_as_torch_multiplies_it() -> None:
    stored = torch.arange(12.0).reshape(3, 4)  # [in, out]
    piece = Piece("w", (3, 4), (0, 2), (3, 2), row=5, transposed=True)
    assert piece.rows == 2
    assert torch.equal(piece.box_of(stored), stored[:, 2:].t())
    assert piece.in_parameter(torch.zeros(9, 3)).shape == (2, 3)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    first = logical([stage("llama", LLAMA)])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = logical([stage("llama", LLAMA)])
    assert torch.equal(torch.get_rng_state(), before), "nobody's random numbers may be used up"
    deeper = logical([stage("llama", {**LLAMA, "num_hidden_layers": 3})])
    other_seed = logical([stage("llama", LLAMA, seed=6)])
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
        assert torch.equal(deeper[name], tensor), f"{name}: other layers must not matter"
        drawn = "norm" not in name and not name.endswith("bias")
        assert torch.equal(other_seed[name], tensor) != drawn, name
    layers = [first[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2)]
    assert not torch.equal(*layers)


def test_initial_weights_are_those_of_the_family() -> None:
    """gpt2: std 0.02, its residual outputs less by √(2 L); norms 1, biases 0 (Radford et al. 2019)."""
    tensors = logical([stage("gpt2", {**GPT2, "n_embd": 128, "n_layer": 8, "vocab_size": 500})])
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif ".ln_" in name:
            assert (tensor == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert tensor.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(tensor.mean().item()) < 0.05 * std, name


def test_drawing_a_logical_tensor() -> None:
    init = Init(mean=1.0, std=0.5)
    assert torch.equal(draw("a", (3, 4), init, 0), draw("a", (3, 4), init, 0))
    assert not torch.equal(draw("a", (3, 4), init, 0), draw("b", (3, 4), init, 0))
    assert torch.equal(draw("a", (3,), Init(mean=2.0), 0), torch.full((3,), 2.0))


def test_named_streams_stay_the_same_for_ever() -> None:
    """A change here changes the initial weights and the dropout of every recipe that was ever run."""
    assert derive_seed(0, "weights", "model.norm.weight") == 2939416004356109950
    assert derive_seed(7) == 8333924190356522945
    assert derive_seed("a", "b") == 501563303439714256
    assert derive_seed(0, "sample") == 5235576165661030330
    assert all(0 <= derive_seed(0, "x", i) < 2**63 for i in range(1000))
    assert len({derive_seed(0, "x", i) for i in range(1000)}) == 1000
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_an_undeclared_parameter_is_refused_by_name() -> None:
    model = stage("gpt2", GPT2)
    model.layers["0"].mlp.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"parameter layers\.0\.mlp\.extra has no ShardSpec"):
        list(owned_specs(model))
    model = stage("gpt2", GPT2)
    model.layers["1"].mlp.up.more = nn.Parameter(torch.zeros(3))  # in a Sharded module, but not declared
    with pytest.raises(TypeError, match=r"parameter layers\.1\.mlp\.up\.more has no ShardSpec"):
        list(owned_specs(model))


@pytest.mark.parametrize(("family", "shape"), MODELS)
def test_every_parameter_is_owned_once(family: str, shape: dict[str, Any]) -> None:
    model = stage(family, shape)
    owned = [parameter for _, parameter, _ in owned_specs(model)]
    assert len({id(p) for p in owned}) == len(owned)
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert dict(model.named_parameters()).keys() == {name for name, _, _ in owned_specs(model)}
    assert logical_specs(from_hf(family, shape)) == [spec for _, _, spec in owned_specs(model)]


def test_a_tie_is_one_parameter() -> None:
    model = stage("gpt2", GPT2)
    assert model.head.output.weight is model.embedding.tokens.weight
    assert [name for name, _, _ in owned_specs(model)].count("embedding.tokens.weight") == 1
    assert "head.output.weight" not in [name for name, _, _ in owned_specs(model)]


def test_materialising_keeps_what_has_storage() -> None:
    with torch.device("meta"):
        module = Sharded()
        module.declare("a", (2, 3), whole("a", (2, 3), role=Role.MATRIX, init=Init(), copies=Group.alone()))
    module.declare("b", (2,), whole("b", (2,), role=Role.NORM, init=Init(), copies=Group.alone()))
    kept = module.b
    materialise(module, torch.device("cpu"))
    assert module.b is kept
    assert (module.a.shape, module.a.device.type, module.a.dtype) == ((2, 3), "cpu", torch.float32)


def test_a_size_that_does_not_divide_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match="attention heads = 8 does not divide over 3 ranks"):
        stage("llama", LLAMA, tp=3)
