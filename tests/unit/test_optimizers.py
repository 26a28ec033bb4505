from pathlib import Path
from typing import get_args

import pytest
import torch
from deepspeed.git_version_info import installed_ops
from torch import nn

from parallel.mesh import Group
from parallel.params import Init, Role, ShardSpec, whole
from trainer.engine.optimizers import MAKERS, groups_of, make_optimizer
from trainer.engine.tiling import Tiling
from trainer.errors import RecipeError
from trainer.model.families import FAMILIES
from trainer.model.hf_config import from_hf
from trainer.model.transformer import logical_specs
from trainer.schema import Optimizer, Recipe
from trainer.update_rules import RULES, RuleName, Shape, StepCount, rule_of, states_of, states_per_element

CPU = torch.device("cpu")


def parameters() -> list[tuple[nn.Parameter, ShardSpec]]:
    shapes = {Role.MATRIX: (4, 3), Role.EMBEDDING: (5, 3), Role.NORM: (3,), Role.BIAS: (4,)}
    return [
        (nn.Parameter(torch.ones(shape)), whole(role, shape, role=role, init=Init(), copies=Group.alone()))
        for role, shape in shapes.items()
    ]


def recipe(**optimizer: object) -> Recipe:
    return Recipe(optimizer=Optimizer(lr=0.1, weight_decay=0.5, **optimizer))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_only_matrices_decay(name: str) -> None:
    """With a gradient of zero whatever moves is decay."""
    params = parameters()
    optimizer = make_optimizer(recipe(name=name), params, CPU)
    for parameter, _ in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, spec in params:
        moved = not torch.equal(parameter, torch.ones_like(parameter))
        assert moved == (spec.role is Role.MATRIX), spec.role
        assert (parameter <= 1).all(), "decay leads to zero"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_roles_of_a_real_model(family: str) -> None:
    """Exactly the weights of linear layers and an untied head decay; a tied head is an embedding."""
    for tied in (True, False) if "tie_word_embeddings" in FAMILIES[family].keys else (True,):
        config = from_hf(family, {"tie_word_embeddings": tied})
        decaying = {p.name for spec in logical_specs(config) if spec.role is Role.MATRIX for p in spec.pieces}
        others = {p.name for spec in logical_specs(config) if spec.role is not Role.MATRIX for p in spec.pieces}
        linear = ("proj.weight", "c_attn.weight", "c_fc.weight", "lm_head.weight", "dense.weight", "fc1.weight", "fc2.weight")
        linear += tuple(f"attention.self.{what}.weight" for what in ("query", "key", "value"))
        linear += tuple(f".{what}.weight" for what in ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"))  # of T5
        assert decaying == {name for name in decaying | others if name.endswith(linear)}
        assert ("lm_head.weight" in decaying) == (not tied)
        assert not decaying & others


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_every_rule_goes_down_a_slope(name: str) -> None:
    params = parameters()
    optimizer = make_optimizer(recipe(name=name), params, CPU)
    for _ in range(3):
        for parameter, _ in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all((parameter < 1).all() for parameter, _ in params)


def test_groups_are_cut_as_tiles_and_into_as_many_as_are_asked_for() -> None:
    """Five matrices of 4 elements and two others of 2; a group never holds both kinds."""
    kinds = [*[(Role.MATRIX, (2, 2))] * 5, *[(Role.NORM, (2,))] * 2]
    specified = [
        (nn.Parameter(torch.ones(shape)), whole(str(n), shape, role=role, init=Init(), copies=Group.alone()))
        for n, (role, shape) in enumerate(kinds)
    ]

    def elements(tiling: Tiling) -> list[list[int]]:
        return [[parameter.numel() for parameter in group] for group in groups_of(specified, tiling)]

    assert elements(Tiling()) == [[4] * 5, [2, 2]]
    assert elements(Tiling(tile=8)) == [[4, 4], [4, 4], [4], [2, 2]]
    assert elements(Tiling(tile=1)) == [[4], [4], [4], [4], [4], [2], [2]]
    assert elements(Tiling(tile=1, num_groups=4)) == [[4, 4], [4, 4], [4], [2, 2]]  # another stage has no more parameters
    assert elements(Tiling(num_groups=4)) == [[4, 4, 4], [2, 2], [4], [4]]
    assert elements(Tiling(tile=2**53, num_groups=2)) == [[4] * 5, [2, 2]]


def test_a_model_without_matrices_or_without_others_has_one_group() -> None:
    matrix, embedding, *_ = parameters()
    for some in ([matrix], [embedding]):
        assert len(make_optimizer(recipe(name="adamw"), some, CPU).param_groups) == 1


def test_lion_decays_only_matrices_too() -> None:
    if not installed_ops.get("cpu_lion"):
        pytest.skip("DeepSpeed's cpu_lion is not built here, and compiling it takes minutes")
    params = parameters()
    optimizer = make_optimizer(recipe(name="lion"), params, CPU)
    for parameter, _ in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, spec in params:
        assert torch.equal(parameter, torch.ones_like(parameter)) == (spec.role is not Role.MATRIX)


def test_lion_without_a_compiler_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(parameters: object) -> None:
        raise RuntimeError("c++ not found\nand forty more lines")

    monkeypatch.setattr("deepspeed.ops.lion.DeepSpeedCPULion", no_compiler)
    with pytest.raises(RecipeError) as caught:
        make_optimizer(recipe(name="lion"), parameters(), CPU)
    assert caught.value.lines == [
        "optimizer.name = lion needs DeepSpeed's DeepSpeedCPULion, which could not be compiled here (c++ not found): "
        "install a C++ compiler (and nvcc for GPUs), or use adamw"
    ]


def test_lion_does_not_wait_for_a_build_that_was_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_lion" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def compiled(parameters: object, **keys: object) -> torch.optim.Optimizer:
        assert not lock.exists()
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    monkeypatch.setattr("deepspeed.ops.lion.DeepSpeedCPULion", compiled)
    make_optimizer(recipe(name="lion"), parameters(), CPU)


def test_the_recipe_s_numbers_reach_the_update_rule() -> None:
    group = make_optimizer(recipe(name="adamw", betas=[0.8, 0.9], eps=1e-6), parameters(), CPU).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.5)
    assert make_optimizer(recipe(name="sgd", momentum=0.9), parameters(), CPU).param_groups[0]["momentum"] == 0.9
    assert isinstance(make_optimizer(recipe(name="adafactor"), parameters(), CPU), torch.optim.Adafactor)


def test_every_rule_has_a_row_and_a_maker() -> None:
    assert set(get_args(RuleName)) == set(RULES) == set(MAKERS)


KEYS = [*[{"name": name} for name in RULES if name != "lion"], {"name": "sgd", "momentum": 0.9}]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_a_row_says_what_the_class_keeps(keys: dict[str, object]) -> None:
    """Names in their order, shapes and the count, as torch has them after a step of a matrix and of a vector."""
    keys_of_recipe = recipe(**keys).optimizer
    rule, rows = rule_of(keys_of_recipe), states_of(keys_of_recipe)
    matrix, vector = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))
    specs = [(p, whole(n, tuple(p.shape), role=r, init=Init(), copies=Group.alone())) for n, r, p in (
        ("matrix", Role.MATRIX, matrix), ("vector", Role.BIAS, vector)
    )]  # fmt: skip
    optimizer = make_optimizer(recipe(**keys), specs, CPU)
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    optimizer.step()
    for parameter in (matrix, vector):
        kept = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        count = kept.pop("step", None)
        assert (count is not None) == (rule.count is StepCount.TENSOR)
        if count is not None:
            assert (count.shape, count.dtype, float(count)) == ((), torch.float32, 1.0)
        dims = parameter.dim()
        expected = [row for row in rows if (dims == 1 if row.of_vectors else dims == 2 or row.shape is Shape.WEIGHT)]
        assert list(kept) == [row.name for row in expected]
        assert [list(value.shape) for value in kept.values()] == [row.shape.beside(parameter.shape) for row in expected]
    whole_ones = [value for value in optimizer.state[matrix].values() if getattr(value, "shape", None) == matrix.shape]
    assert states_per_element(keys_of_recipe) == len(whole_ones)


def test_a_row_of_lion_says_what_the_class_keeps() -> None:
    if not installed_ops.get("cpu_lion"):
        pytest.skip("DeepSpeed's cpu_lion is not built here, and compiling it takes minutes")
    parameter, spec = parameters()[0]
    optimizer = make_optimizer(recipe(name="lion"), [(parameter, spec)], CPU)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert RULES["lion"].count is StepCount.NUMBER
    assert optimizer.state[parameter]["step"] == 1
    assert [name for name in optimizer.state[parameter] if name != "step"] == [row.name for row in RULES["lion"].states]
