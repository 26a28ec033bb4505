"""Each parallel layer against its unsharded twin: output, input gradient, weight gradients, at odd sizes.

fp32 to 1e-5 and float64 to 1e-12: a rounding difference shrinks with the format, a mistake stays.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parallel.attention import Documents, ParallelAttention, _Rotate
from parallel.embedding import VocabParallelEmbedding, rotary_tables
from parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from parallel.loss import IGNORE, VocabParallelHead
from parallel.mesh import Group, Mesh
from parallel.mlp import ParallelMLP
from parallel.norm import RMSNorm, _RMSNorm
from parallel.params import Init, draw, initialise, owned_specs
from parallel.topology import Layout
from tests.spawn import spawn

B, S, D = 3, 7, 24
LENGTHS = ((7,), (2, 5), (1, 3, 3))
INIT = Init(std=0.3)


def column(group: Group) -> nn.Module:
    outputs = [Output("a", 12), Output("b", 20)]
    return ColumnParallelLinear(D, outputs, bias=True, init=INIT, transposed=False, group=group)


def column_transposed(group: Group) -> nn.Module:
    outputs = [Output("f", 8, 0, 24), Output("f", 8, 8, 24), Output("f", 8, 16, 24)]
    return ColumnParallelLinear(D, outputs, bias=True, init=INIT, transposed=True, group=group)


def row(group: Group) -> nn.Module:
    return RowParallelLinear(D, 13, name="r", bias=True, init=INIT, transposed=True, group=group)


def embedding(group: Group) -> nn.Module:
    return VocabParallelEmbedding(37, D, name="e", init=INIT, group=group)


def gated_mlp(group: Group) -> nn.Module:
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
        group=group,
    )


def attention(group: Group) -> nn.Module:
    return ParallelAttention(
        hidden_size=D,
        num_heads=8,
        num_kv_heads=4,
        head_dim=6,
        query=Output("q", 48),
        key=Output("k", 24),
        value=Output("v", 24),
        out="o",
        qkv_bias=True,
        out_bias=True,
        transposed=False,
        dropout=0.0,
        causal=True,
        init=INIT,
        out_init=INIT,
        group=group,
    )


def head(group: Group) -> nn.Module:
    return VocabParallelHead(37, D, name="h", init=INIT, group=group, tied_to=None)


LAYERS = {make.__name__: make for make in (column, column_transposed, row, embedding, gated_mlp, attention, head)}


def run(name: str, layer: nn.Module, x: Tensor, group: Group) -> Tensor:
    """The layer's whole output: what a column-parallel layer divides is put together again, without gradient tricks."""
    documents = Documents(LENGTHS)
    if name == "attention":
        return layer(x, documents, rotary_tables(documents.positions_BS, 6, 10000.0, x.dtype))
    if name == "row":
        part = x.shape[-1] // group.size
        return layer(x[..., group.rank * part : (group.rank + 1) * part])
    if name == "head":
        labels = torch.randint(0, 37, (B, S), generator=torch.Generator().manual_seed(2))
        labels[0, 3] = labels[2, 6] = IGNORE
        return layer(x, labels)
    return layer(x)


def compare(mesh: Mesh, name: str, dtype: torch.dtype, tolerance: float) -> None:
    group = mesh.tp
    torch.set_default_dtype(dtype)
    twin, layer = LAYERS[name](Group.alone()), LAYERS[name](group)
    initialise(twin, seed=1)
    initialise(layer, seed=1)
    x = draw("x", (B, S, D), Init(std=1.0), 3).to(dtype)
    if name == "embedding":
        x = torch.randint(0, 37, (B, S), generator=torch.Generator().manual_seed(4))
    x_twin, x_layer = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
    expected, got = run(name, twin, x_twin, Group.alone()), run(name, layer, x_layer, group)
    upstream = draw("dy", tuple(expected.shape), Init(std=1.0), 5).to(dtype)
    upstream_local = upstream
    if name.startswith("column"):  # this rank holds its share of each fused output
        shares, at = [], 0
        for local in layer.local_features:
            shares.append(slice(at + group.rank * local, at + (group.rank + 1) * local))
            at += local * group.size
        expected_local = torch.cat([expected[..., s] for s in shares], -1)
        upstream_local = torch.cat([upstream[..., s] for s in shares], -1)
    else:
        expected_local = expected
    torch.testing.assert_close(got, expected_local, rtol=tolerance, atol=tolerance)
    expected.backward(upstream)
    got.backward(upstream_local)
    if name == "row":  # each rank sees the gradient of its own input features
        part = D // group.size
        own = slice(group.rank * part, (group.rank + 1) * part)
        torch.testing.assert_close(x_layer.grad[..., own], x_twin.grad[..., own], rtol=tolerance, atol=tolerance)
    elif x.is_floating_point():
        torch.testing.assert_close(x_layer.grad, x_twin.grad, rtol=tolerance, atol=tolerance)
    logical: dict[str, Tensor] = {}
    for _, parameter, spec in owned_specs(twin):
        for piece in spec.pieces:
            whole = logical.setdefault(piece.name, torch.zeros(piece.shape))
            piece.box_of(whole).copy_(piece.in_parameter(parameter.grad))
    for _, parameter, spec in owned_specs(layer):
        covered = 0
        for piece in spec.pieces:
            torch.testing.assert_close(
                piece.in_parameter(parameter.grad), piece.box_of(logical[piece.name]), rtol=tolerance, atol=tolerance
            )
            covered += piece.rows
        assert not parameter.grad[covered:].any(), "padding rows got a gradient"


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_layer_equals_its_unsharded_twin(tp: int, dtype: torch.dtype, tolerance: float) -> None:
    spawn(compare_all, Layout(tp=tp), dtype, tolerance)


def compare_all(mesh: Mesh, dtype: torch.dtype, tolerance: float) -> None:
    for name in LAYERS:
        compare(mesh, name, dtype, tolerance)


def test_rms_norm_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(D, eps=1e-5, name="n").double()
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (x, norm.weight))
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (D,), norm.weight, 1e-5), rtol=1e-12, atol=1e-12)


def test_rotation_has_the_gradient_of_its_formula() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    documents = Documents(((5,), (2, 3)))
    tables = rotary_tables(documents.positions_BS, 8, 10000.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, *tables), (x,))
