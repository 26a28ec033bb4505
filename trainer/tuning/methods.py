"""The methods of tuning, a row each, as far as they need no torch.

A new method is a name in the recipe's schema, a row here, and a row in `builders.py`, which knows
the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from trainer.schema import Finding, Recipe, Tuning
from trainer.tuning.sizes import Column, Row, bottleneck, low_rank, rescaled_inputs, rescaled_outputs

# The projections that a word of tuning.targets means.
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    **{projection: (projection,) for projection in ("q", "k", "v", "o", "gate", "up", "down")},
}
# The last projections of the attention and of the MLP, for methods that change their whole output.
LAST: Mapping[str, tuple[str, ...]] = {"attention": ("o",), "mlp": ("down",)}


def _nothing(recipe: Recipe) -> Iterable[Finding]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of tuning.

    | field | meaning |
    |---|---|
    | `parts` | endings of the names of what is trained beside a module, in the order of `builders.py` |
    | `words` | the legal tuning.targets, and the projections that each means |
    | `targets` | the words where the recipe gives none |
    | `trains_biases` | whether the model's own biases are trained |
    | `not_merged` | why the parts cannot be merged into weights; "" where they can |
    | `beside_column`, `beside_row` | sizes of what is put beside a layer of that kind; None: nothing |
    | `keeps_inputs`, `keeps_outputs` | whether a (column-parallel, row-parallel) layer's are kept for its gradients |
    | `findings` | what is wrong with a recipe that has this method |
    """

    parts: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, ...]]
    targets: tuple[str, ...] = ()
    trains_biases: bool = False
    not_merged: str = ""
    beside_column: Column | None = None
    beside_row: Row | None = None
    keeps_inputs: tuple[bool, bool] = (False, False)
    keeps_outputs: tuple[bool, bool] = (False, False)
    findings: Callable[[Recipe], Iterable[Finding]] = _nothing

    @property
    def is_low_rank(self) -> bool:
        """Return whether its parts are factors of tuning.rank inner features."""
        return any("lora_A" in part for part in self.parts)

    @property
    def has_bottleneck(self) -> bool:
        """Return whether its parts are a network of tuning.bottleneck inner features."""
        return any("adapter_down" in part for part in self.parts)

    @property
    def merges(self) -> bool:
        """Return whether the parts can be merged into the model's own weights."""
        return bool(self.parts) and not self.not_merged


def budget_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding if AdaLoRA has no ranks to share out, or no steps to do it in, where they are
    known."""
    rank, budget, steps = recipe.tuning.rank, recipe.tuning.budget, recipe.train.steps
    if budget.target_rank >= rank:
        yield Finding(
            ("tuning.budget.target_rank", "tuning.rank"),
            f"tuning.budget.target_rank = {budget.target_rank} leaves nothing to share out of tuning.rank = {rank}: legal: "
            f"below {rank}, or tuning.rank above {budget.target_rank}",
        )
    if steps is not None and (fixed := budget.warmup_steps + budget.final_steps) >= steps:
        yield Finding(
            ("tuning.budget.warmup_steps", "tuning.budget.final_steps", "train.steps"),
            f"tuning.budget: warmup_steps {budget.warmup_steps} + final_steps {budget.final_steps} = {fixed} of train.steps = "
            f"{steps} leave no step in which ranks are shared out: legal: fewer than {steps} together",
        )


_lora, _dora, _adalora = low_rank(), low_rank(magnitude=True), low_rank(singular_values=True)

# The names of parts end as in peft, which has no bottleneck adapters. Where the recipe names no
# targets, all projections have low-rank factors (Dettmers et al. 2023, arXiv:2305.14314, §4); (IA)³
# and bottleneck adapters are where their papers have them.
METHODS: Mapping[str, Method] = {
    "lora": Method(
        parts=(".lora_A.weight", ".lora_B.weight"),
        words=PROJECTIONS,
        targets=("attention", "mlp"),
        beside_column=_lora[0],
        beside_row=_lora[1],
        keeps_inputs=(True, True),
    ),
    "dora": Method(
        parts=(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
        words=PROJECTIONS,
        targets=("attention", "mlp"),
        beside_column=_dora[0],
        beside_row=_dora[1],
        keeps_inputs=(True, True),
        keeps_outputs=(True, True),
    ),
    "adalora": Method(
        parts=(".lora_A", ".lora_B", ".lora_E"),
        words=PROJECTIONS,
        targets=("attention", "mlp"),
        beside_column=_adalora[0],
        beside_row=_adalora[1],
        keeps_inputs=(True, True),
        findings=budget_findings,
    ),
    "ia3": Method(
        parts=(".ia3_l",),
        words=PROJECTIONS,
        targets=("k", "v", "down"),
        beside_column=rescaled_outputs,
        beside_row=rescaled_inputs,
        keeps_inputs=(False, True),
        keeps_outputs=(True, False),
    ),
    "adapter": Method(
        parts=(".adapter_down.weight", ".adapter_down.bias", ".adapter_up.weight", ".adapter_up.bias"),
        words=LAST,
        targets=("attention", "mlp"),
        beside_row=bottleneck,
        keeps_outputs=(False, True),
        not_merged="an adapter has a nonlinearity between its projections, so no weight can take it up",
    ),
    "bitfit": Method(words={}, trains_biases=True),
}
UNTUNED = Method(words={})


def method_of(tuning: Tuning) -> Method:
    """Return the row of the recipe's method; `UNTUNED` where it has none."""
    return UNTUNED if tuning.method is None else METHODS[tuning.method]


def names_of_methods(wanted: Callable[[Method], bool]) -> list[str]:
    """Return the methods that are `wanted`, for a message."""
    return [name for name, method in METHODS.items() if wanted(method)]
