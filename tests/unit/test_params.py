import pytest
import torch
from torch import nn

from parallel.embedding import VocabParallelEmbedding
from parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from parallel.loss import VocabParallelHead
from parallel.mesh import Group
from parallel.params import Init, Piece, Role, Sharded, derive_seed, draw, initialise, materialise, owned_specs, whole

INIT = Init(std=0.02)


def group_of(rank: int, size: int) -> Group:
    """A place among ranks that never communicate: enough to build shards."""
    return Group(rank=rank, ranks=tuple(range(size)), handle=None)


def build(kind: str, group: Group) -> Sharded:
    if kind == "fused qkv":
        outputs = [Output("q", 16), Output("k", 8), Output("v", 8)]
        return ColumnParallelLinear(6, outputs, bias=True, init=INIT, transposed=False, group=group)
    if kind == "gpt2's fused and transposed":
        outputs = [Output("c", 8, at, 24) for at in (0, 8, 16)]
        return ColumnParallelLinear(6, outputs, bias=True, init=INIT, transposed=True, group=group)
    if kind == "row":
        return RowParallelLinear(8, 5, name="r", bias=True, init=INIT, transposed=False, group=group)
    if kind == "vocabulary that does not divide":
        return VocabParallelEmbedding(13, 6, name="e", init=INIT, group=group)
    return VocabParallelHead(13, 6, name="h", init=INIT, group=group, tied_to=None)


KINDS = ["fused qkv", "gpt2's fused and transposed", "row", "vocabulary that does not divide", "head"]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_cut_from_the_same_logical_tensors_at_any_degree(kind: str, size: int) -> None:
    logical: dict[str, torch.Tensor] = {}
    covered: dict[str, torch.Tensor] = {}
    for rank in range(size):
        layer = build(kind, group_of(rank, size))
        initialise(layer, seed=7)
        for _, parameter, spec in owned_specs(layer):
            for piece in spec.pieces:
                whole_tensor = logical.setdefault(piece.name, torch.full(piece.shape, torch.nan))
                count = covered.setdefault(piece.name, torch.zeros(piece.shape))
                piece.box_of(whole_tensor).copy_(piece.in_parameter(parameter.data))
                piece.box_of(count).add_(1)
    for name, tensor in logical.items():
        init = Init() if name.endswith("bias") else INIT
        assert torch.equal(tensor, draw(name, tuple(tensor.shape), init, 7)), name
        shared = kind == "row" and name.endswith("bias")
        assert (covered[name] == (size if shared else 1)).all(), "each element on one rank, or replicated on all"


def test_padding_rows_of_the_vocabulary_are_zero() -> None:
    layer = build("vocabulary that does not divide", group_of(3, 4))
    layer.weight.data.fill_(torch.nan)
    initialise(layer, seed=7)
    assert layer.weight.shape == (4, 6)  # 16 rows over 4 ranks, of which 13 are real: the last rank has 1
    assert layer.weight[:1].isfinite().all()
    assert not layer.weight[1:].any()


def test_weights_depend_on_the_seed_and_the_name_only() -> None:
    a = draw("w", (4, 4), INIT, 1)
    torch.manual_seed(123)
    torch.rand(10)
    assert torch.equal(a, draw("w", (4, 4), INIT, 1))
    assert not torch.equal(a, draw("w", (4, 4), INIT, 2))
    assert not torch.equal(a, draw("v", (4, 4), INIT, 1))


def test_named_streams_never_move() -> None:
    """A change here would give every recipe other weights and another data order: pinned."""
    assert derive_seed(0, "weights", "lm_head.weight") == derive_seed("0", "weights", "lm_head.weight")
    assert derive_seed(0, "weights", "lm_head.weight") == 1_904_513_876_826_399_530
    assert 0 <= derive_seed("x") < 2**63


def test_a_parameter_that_nobody_declared_is_an_error() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match=r"parameter inner\.scale has no ShardSpec"):
        list(owned_specs(nn.ModuleDict({"inner": Careless()})))


def test_a_borrowed_parameter_belongs_to_its_owner_alone() -> None:
    embedding = VocabParallelEmbedding(8, 4, name="e", init=INIT, group=Group.alone())
    head = VocabParallelHead(8, 4, name="h", init=INIT, group=Group.alone(), tied_to=embedding)
    assert head.weight is embedding.weight
    names = [piece.name for _, _, spec in owned_specs(nn.ModuleList([embedding, head])) for piece in spec.pieces]
    assert names == ["e"]


def test_materialise_gives_storage_to_meta_parameters_only() -> None:
    with torch.device("meta"):
        layer = build("row", Group.alone())
    layer.bias = nn.Parameter(torch.ones(5))
    materialise(layer, torch.device("cpu"))
    assert layer.weight.device.type == "cpu"
    assert torch.equal(layer.bias, torch.ones(5))


def test_degrees_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="q: output features = 16 does not divide over 3 ranks"):
        build("fused qkv", group_of(0, 3))


def test_transposed_pieces_come_back_as_they_lie_in_the_parameter() -> None:
    logical = torch.arange(12.0).reshape(3, 4)  # [in, out]
    piece = Piece("w", (3, 4), (0, 2), (3, 2), row=0, transposed=True)
    assert piece.rows == 2
    assert torch.equal(piece.box_of(logical), logical[:, 2:].t())
    spec = whole("w", (3,), role=Role.NORM, init=Init(mean=1.0))
    assert torch.equal(draw("w", (3,), spec.init, 0), torch.ones(3))
