"""Each parallel layer against its unsharded twin: output, input gradient, weight gradients, at odd sizes.

fp32 to 1e-5 and float64 to 1e-12: a rounding difference shrinks with the format, a mistake stays.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from parallel.attention import ParallelAttention
from parallel.documents import Documents
from parallel.embedding import ReplicatedEmbedding, VocabParallelEmbedding, rotary_tables
from parallel.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from parallel.loss import IGNORE, VocabParallelHead
from parallel.low_rank import ColumnLowRank, LowRank, RowLowRank
from parallel.mesh import Mesh
from parallel.mlp import ParallelMLP
from parallel.norm import LayerNorm, RMSNorm, _RMSNorm
from parallel.outputs import Output
from parallel.params import Init, complete_partial_gradients, copy_pieces, draw, initialise, owned_specs
from parallel.rescaling import InputRescaling, OutputRescaling
from parallel.rotation import Rotate
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from tests.spawn import spawn
from trainer.model.transformer import key_value_copies

S, D = 8, 24
LENGTHS = ((8,), (2, 6), (1, 4, 3))
N = 24  # tokens; four shares of them begin and end inside a row
INIT = Init(std=0.3)


def column(tp: TensorParallel) -> nn.Module:
    outputs = [Output("a", 12), Output("b", 20)]
    return ColumnParallelLinear(D, outputs, bias=True, init=INIT, transposed=False, tp=tp)


def column_transposed(tp: TensorParallel) -> nn.Module:
    outputs = [Output("f", 8, 0, 24), Output("f", 8, 8, 24), Output("f", 8, 16, 24)]
    return ColumnParallelLinear(D, outputs, bias=True, init=INIT, transposed=True, tp=tp)


def row(tp: TensorParallel) -> nn.Module:
    return RowParallelLinear(D, 13, name="r", bias=True, init=INIT, transposed=True, tp=tp)


def replicated(tp: TensorParallel) -> nn.Module:
    return ReplicatedLinear(D, 13, name="w", init=INIT, tp=tp)


def embedding(tp: TensorParallel) -> nn.Module:
    return VocabParallelEmbedding(37, D, name="e", init=INIT, tp=tp)


def gated_mlp(tp: TensorParallel) -> nn.Module:
    return ParallelMLP(
        hidden_size=D,
        ffn_size=44,
        activation="silu",
        inputs=[Output("g", 44), Output("u", 44)],
        out="d",
        bias=True,
        transposed=False,
        init=INIT,
        out_init=INIT,
        tp=tp,
    )


def attention(tp: TensorParallel, num_kv_heads: int = 4, transposed: bool = False) -> nn.Module:
    features = 6 * num_kv_heads
    return ParallelAttention(
        hidden_size=D,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        head_dim=6,
        query=Output("q", 48),
        key=Output("kv", features, 0, 2 * features),
        value=Output("kv", features, features, 2 * features),
        out="o",
        qkv_bias=True,
        out_bias=True,
        transposed=transposed,
        dropout=0.0,
        causal=True,
        init=INIT,
        out_init=INIT,
        tp=tp,
        kv_copies=key_value_copies(num_kv_heads, tp.group),
    )


def attention_sharing_keys(tp: TensorParallel) -> nn.Module:
    """2 key/value heads: at degree 4 two ranks share each."""
    return attention(tp, num_kv_heads=2, transposed=True)


def head(tp: TensorParallel) -> nn.Module:
    return VocabParallelHead(37, D, name="h", init=INIT, tp=tp, tied_to=None)


def head_with_bias(tp: TensorParallel) -> nn.Module:
    return VocabParallelHead(37, D, name="h", init=INIT, tp=tp, tied_to=None, bias="b", softcap=2.0)


def head_token_losses(tp: TensorParallel) -> nn.Module:
    """Each token's loss, with a gradient of its own."""
    return head_with_bias(tp)


def mlp_norm(tp: TensorParallel) -> nn.Module:
    return LayerNorm(D, eps=1e-5, bias=True, name="n", tp=tp)


def positions(tp: TensorParallel) -> nn.Module:
    return ReplicatedEmbedding(11, D, name="p", init=INIT, tp=tp)


def with_lora(layer: nn.Module, *modules: str, magnitude: bool = False) -> nn.Module:
    """The layer frozen, with factors beside it that both start off 0: else A would have no gradient."""
    keys = LowRank(rank=3, scale=0.7, magnitude=magnitude)
    layer.requires_grad_(False)
    for linear in list(layer.modules()):
        if isinstance(linear, ColumnParallelLinear):
            linear.beside = ColumnLowRank(linear, modules, keys)
        elif isinstance(linear, RowParallelLinear):
            linear.beside = RowLowRank(linear, keys)
    for module in layer.modules():
        if isinstance(module, ColumnLowRank | RowLowRank):
            module.specs = {name: replace(spec, init=INIT) for name, spec in module.specs.items()}
    return layer


def column_lora(tp: TensorParallel) -> nn.Module:
    return with_lora(column(tp), "b")


def column_lora_fused(tp: TensorParallel) -> nn.Module:
    """One module of three outputs has one A."""
    return with_lora(column_transposed(tp), "f")


def row_lora(tp: TensorParallel) -> nn.Module:
    return with_lora(row(tp))


def gated_mlp_lora(tp: TensorParallel) -> nn.Module:
    return with_lora(gated_mlp(tp), "g", "u")


def attention_sharing_keys_lora(tp: TensorParallel) -> nn.Module:
    return with_lora(attention_sharing_keys(tp), "q", "kv")


def attention_sharing_keys_dora(tp: TensorParallel) -> nn.Module:
    return with_lora(attention_sharing_keys(tp), "q", "kv", magnitude=True)


def column_ia3(tp: TensorParallel) -> nn.Module:
    layer = column(tp).requires_grad_(False)
    layer.beside = OutputRescaling(layer, ["b"])
    return layer


def row_ia3(tp: TensorParallel) -> nn.Module:
    layer = row(tp).requires_grad_(False)
    layer.beside = InputRescaling(layer)
    return layer


MAKERS = (
    column,
    column_transposed,
    row,
    column_lora,
    column_lora_fused,
    row_lora,
    gated_mlp_lora,
    attention_sharing_keys_lora,
    attention_sharing_keys_dora,
    column_ia3,
    row_ia3,
    replicated,
    embedding,
    positions,
    mlp_norm,
    gated_mlp,
    attention,
    attention_sharing_keys,
    head,
    head_with_bias,
    head_token_losses,
)
LAYERS = {make.__name__: make for make in MAKERS}


def run(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    documents = Documents(LENGTHS)
    if name.startswith("attention"):
        return layer(x, documents, rotary_tables(documents.positions_BS, 6, 10000.0, x.dtype), None)
    if name.startswith("head"):
        labels_N = torch.randint(0, 37, (N,), generator=torch.Generator().manual_seed(2))
        labels_N[3] = labels_N[20] = IGNORE
        assert isinstance(layer, VocabParallelHead)
        return (layer.token_losses if name == "head_token_losses" else layer.loss_sum)(x, labels_N)
    return layer(x)


def whole_input(name: str, dtype: torch.dtype) -> Tensor:
    if name == "embedding":
        return torch.randint(0, 37, (N,), generator=torch.Generator().manual_seed(4))
    if name == "positions":
        return torch.randint(0, 11, (N,), generator=torch.Generator().manual_seed(4))
    return draw("x", (N, D), Init(std=1.0), 3).to(dtype)


def part_of_input(name: str, x: Tensor, tp: TensorParallel) -> tuple[slice, ...]:
    """What of the input this rank has: row-parallel layers some features, the others all or some tokens."""
    if name.startswith("row"):
        part = D // tp.group.size
        return slice(None), slice(tp.group.rank * part, (tp.group.rank + 1) * part)
    return (tp.tokens(N) if x.is_floating_point() else slice(None),)


def part_of_output(name: str, layer: nn.Module, y: Tensor, tp: TensorParallel) -> Tensor:
    """What of the whole output this rank has: column-parallel layers some of each fused output's features."""
    if name.startswith("column"):
        shares, at = [], 0
        for local in (shard.features for shard in layer.local_shards):
            shares.append(y[:, at + tp.group.rank * local : at + (tp.group.rank + 1) * local])
            at += local * tp.group.size
        return torch.cat(shares, -1)
    return y if name.startswith("head") else y[tp.tokens(N)]


def compare(name: str, tp: TensorParallel, dtype: torch.dtype, tolerance: float) -> Tensor:
    """Fails when the layer differs from its twin; its output."""
    torch.set_default_dtype(dtype)
    twin, layer = LAYERS[name](TensorParallel.alone()), LAYERS[name](tp)
    for module in (twin, layer):
        initialise(module, seed=1)
    complete_partial_gradients(layer)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)

    x = whole_input(name, dtype)
    part = part_of_input(name, x, tp)
    x_twin, x_layer = (x[at].clone().requires_grad_(x.is_floating_point()) for at in (..., part))
    expected, got = run(name, twin, x_twin), run(name, layer, x_layer)
    close(got, part_of_output(name, layer, expected, tp))

    upstream = draw("dy", tuple(expected.shape), Init(std=1.0), 5).to(dtype)
    expected.backward(upstream)
    got.backward(part_of_output(name, layer, upstream, tp))
    if x.is_floating_point():
        close(x_layer.grad, x_twin.grad[part])
    logical: dict[str, Tensor] = {}
    for _, parameter, spec in owned_specs(twin):
        if not parameter.requires_grad:
            continue
        for piece in spec.pieces:
            whole = logical.setdefault(piece.name, torch.zeros(piece.shape))
            piece.box_of(whole).copy_(piece.in_parameter(parameter.grad))
    for _, parameter, spec in owned_specs(layer):
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        covered = 0
        for piece in spec.pieces:
            close(piece.in_parameter(parameter.grad), piece.box_of(logical[piece.name]))
            covered += piece.rows
        assert not parameter.grad[covered:].any(), "padding rows got a gradient"
    return torch.cat([got.detach().flatten(), *(p.grad.flatten() for p in layer.parameters() if p.requires_grad)])


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_layer_equals_its_unsharded_twin(tp: int, dtype: torch.dtype, tolerance: float) -> None:
    spawn(compare_all, Layout(tp=tp), dtype, tolerance)


def compare_all(mesh: Mesh, dtype: torch.dtype, tolerance: float) -> None:
    for name in LAYERS:
        for sequence in (False, True):
            overlapped, alone = (
                compare(name, TensorParallel(mesh.tp, sequence=sequence, overlap=overlap), dtype, tolerance)
                for overlap in (True, False)
            )
            assert torch.equal(overlapped, alone), f"{name}: overlap changes the result"


@pytest.mark.parametrize("tp", [2, 4])
def test_a_divided_head_counts_the_same_hits(tp: int) -> None:
    spawn(compare_hits, Layout(tp=tp))


def compare_hits(mesh: Mesh) -> None:
    """Three equal rows of W that lie on different ranks tie for the highest logit of many tokens: the lowest id counts."""
    torch.set_default_dtype(torch.float64)
    alone = TensorParallel.alone()
    logical = {name: draw(name, shape, INIT, 1) for name, shape in (("h", (37, D)), ("b", (37,)))}
    for name in logical:
        logical[name][[17, 36]] = logical[name][4].clone()
    x = draw("x", (N, D), Init(std=1.0), 3)
    x[::2] = 4.0 * logical["h"][4]
    labels_N = torch.tensor([4, 17, 36, IGNORE])[torch.arange(N) % 4]
    found = []
    for place in (alone, TensorParallel(mesh.tp, sequence=False), TensorParallel(mesh.tp, sequence=True)):
        layer = head_with_bias(place)
        for _, parameter, spec in owned_specs(layer):
            copy_pieces(parameter, spec, logical)
        found.append(layer.losses_and_hits(x[place.tokens(N)], labels_N))
    hits_N = found[0][1]
    assert hits_N.sum() >= N // 4, "the lowest of the equal rows is a hit"
    assert torch.equal(hits_N, (alone_guesses(logical, x) == labels_N).double())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=0)


def alone_guesses(logical: dict[str, Tensor], x: Tensor) -> Tensor:
    """The lowest id of the highest logits; those of equal rows may differ by rounding, and argmax takes any of equal ones."""
    logits = torch.nn.functional.linear(x, logical["h"], logical["b"])
    is_highest = logits > logits.amax(-1, keepdim=True) - 1e-9
    return torch.where(is_highest, torch.arange(logits.shape[-1]), logits.shape[-1]).amin(-1)


def test_rms_norm_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(D, eps=1e-5, name="n", tp=TensorParallel.alone()).double()
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(3, S, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (x, norm.weight))
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (D,), norm.weight, 1e-5), rtol=1e-12, atol=1e-12)


def test_rotation_has_the_gradient_of_its_formula() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    documents = Documents(((5,), (2, 3)))
    tables = rotary_tables(documents.positions_BS, 8, 10000.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, *tables, 1, 1), (x,))
