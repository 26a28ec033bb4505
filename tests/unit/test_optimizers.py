import pytest
import torch
from torch import nn

from parallel.params import Init, Role, ShardSpec, whole
from trainer.optimizers import make_optimizer
from trainer.sections import Optimizer, Recipe

CPU = torch.device("cpu")


def parameters() -> list[tuple[nn.Parameter, ShardSpec]]:
    shapes = {Role.MATRIX: (4, 3), Role.EMBEDDING: (5, 3), Role.NORM: (3,), Role.BIAS: (4,)}
    return [(nn.Parameter(torch.ones(shape)), whole(role, shape, role=role, init=Init())) for role, shape in shapes.items()]


def recipe(**optimizer: object) -> Recipe:
    return Recipe(optimizer=Optimizer(lr=0.1, weight_decay=0.5, **optimizer))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
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


def test_the_recipe_s_numbers_reach_the_update_rule() -> None:
    group = make_optimizer(recipe(name="adamw", betas=[0.8, 0.9], eps=1e-6), parameters(), CPU).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.5)
    assert make_optimizer(recipe(name="sgd", momentum=0.9), parameters(), CPU).param_groups[0]["momentum"] == 0.9
    assert isinstance(make_optimizer(recipe(name="adafactor"), parameters(), CPU), torch.optim.Adafactor)


def test_adafactor_decays_only_matrices_too() -> None:
    decays = [group["weight_decay"] for group in make_optimizer(recipe(name="adafactor"), parameters(), CPU).param_groups]
    assert decays == [0.5, 0.0]
