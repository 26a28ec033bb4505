"""The update rules, a row each: the states of a weight, the keys that a rule reads, and its limits.
No torch.

To add a rule, add a name and a row here, and a function that makes its class in
`engine/optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

RuleName = Literal["adamw", "adam", "sgd", "lion", "adafactor"]

WEIGHT = "weight"  # the state of every weight; others have the optimizer's names: exp_avg


class OptimizerKeys(Protocol):
    """The section `optimizer` of a recipe, whose class is in a layer above this file."""

    @property
    def name(self) -> RuleName: ...


class Shape(Enum):
    """The shape of a state of a weight."""

    WEIGHT = "the weight's own"
    ROWS = "one value for each row of a matrix"
    COLUMNS = "one value for each column of a matrix"

    def beside(self, weight: Sequence[int]) -> list[int]:
        """Return the shape of the state of a weight with that shape; a dimension that is averaged
        has size 1."""
        shape = list(weight)
        if self is not Shape.WEIGHT:
            shape[-1 if self is Shape.ROWS else -2] = 1
        return shape


class StepCount(Enum):
    """A way to count the updates of each weight, beside its states."""

    NONE = "it does not"
    NUMBER = "in an int"
    TENSOR = "in a scalar fp32 tensor, on the weight's device if torch's rule is fused, else on the host"


@dataclass(frozen=True)
class State:
    """A state of a weight. `needs`: the key of the section `optimizer` without which (0) it is not
    kept. `of_vectors`: only vectors have it."""

    name: str
    shape: Shape = Shape.WEIGHT
    needs: str | None = None
    of_vectors: bool = False


class Extensions(NamedTuple):
    """The names of DeepSpeed's compiled extensions, by the place of the states."""

    on_host: str
    on_gpu: str


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An update rule, described without its class.

    | field | meaning |
    |---|---|
    | `states` | the states of a weight, in the order in which checkpoints list them |
    | `count` | the way it counts its updates |
    | `lr_beside_adamw` | its learning rate beside AdamW's; None: rates of AdamW tell nothing about it |
    | `reads` | keys of the section `optimizer` that it is given, beside `lr` and `weight_decay` |
    | `on_nvme` | whether DeepSpeed can swap its states, which takes exactly those of Adam |
    | `in_float64` | whether its class computes in float64, as `triaxis verify` wants it to |
    | `not_divided` | why it works at zero.stage 0 only ({}: the stage asked for); "": at every stage |
    | `extensions` | DeepSpeed's compiled extensions that compute it; None: torch computes it |
    | `not_sharded` | why it works at parallel.tensor 1 only ({}: the degree asked for); "": at any |
    """

    states: tuple[State, ...]
    count: StepCount
    reads: tuple[str, ...]
    lr_beside_adamw: float | None = None
    on_nvme: bool = False
    in_float64: bool = True
    extensions: Extensions | None = None
    not_divided: str = ""
    not_sharded: str = ""


_ADAM = UpdateRule(
    states=(State("exp_avg"), State("exp_avg_sq")),
    count=StepCount.TENSOR,
    reads=("betas", "eps"),
    lr_beside_adamw=1.0,
    on_nvme=True,
)
RULES: dict[RuleName, UpdateRule] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "sgd": UpdateRule(states=(State("momentum_buffer", needs="momentum"),), count=StepCount.NONE, reads=("momentum",)),
    "lion": UpdateRule(
        states=(State("exp_avg"),),
        count=StepCount.NUMBER,
        reads=("betas",),
        # 3 to 10 times less, with as much more decay (Chen et al. 2023, arXiv:2302.06675, §5)
        lr_beside_adamw=0.1,
        in_float64=False,  # DeepSpeed's extension
        extensions=Extensions(on_host="cpu_lion", on_gpu="fused_lion"),
    ),
    "adafactor": UpdateRule(
        states=(State("row_var", Shape.ROWS), State("col_var", Shape.COLUMNS), State("variance", of_vectors=True)),
        count=StepCount.TENSOR,
        reads=(),
        not_divided="keeps second moments per row and column, which zero.stage {} flattens away",
        not_sharded="averages second moments over whole rows and columns of a weight, of which parallel.tensor {} gives "
        "each rank a part: not the same training",
    ),
}


def rules_that_read(key: str) -> list[RuleName]:
    """Return the rules that read this key of the section `optimizer`."""
    return [name for name, rule in RULES.items() if key in rule.reads]


def rule_of(keys: OptimizerKeys) -> UpdateRule:
    """Return the rule that the section `optimizer` names."""
    return RULES[keys.name]


def states_of(keys: OptimizerKeys) -> list[State]:
    """Return the states that the rule keeps with these keys, beside the weights themselves."""
    return [state for state in rule_of(keys).states if state.needs is None or getattr(keys, state.needs)]


def states_per_element(keys: OptimizerKeys) -> int:
    """Return how many numbers are kept for each element of a weight. States of whole rows and
    columns are left out, because they are small."""
    return sum(state.shape is Shape.WEIGHT and not state.of_vectors for state in states_of(keys))
