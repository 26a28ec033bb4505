"""Rules of the keys that compare a run's evaluations: checkpoint.best and train.patience."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from trainer.model.measures import EVAL, LOSS, OF_TRANSLATIONS, Aim, Better, figures_of
from trainer.schema import Finding, Recipe
from trainer.spelling import nearest

BEST, PATIENCE = "checkpoint.best", "train.patience"


def aim_of(recipe: Recipe) -> Aim:
    """Return the figure by which the evaluations of a sound recipe are compared."""
    figure = recipe.checkpoint.best or LOSS
    return Aim(figure, figures(recipe)[figure])


def figures(recipe: Recipe) -> Mapping[str, Better]:
    """Return the figures that checkpoint.best may name, as far as the number of classes is known:
    those of two if it is not."""
    return figures_of(recipe.data.task, len(recipe.data.classes) or 2)


def best_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield what makes checkpoint.best mean nothing."""
    best = recipe.checkpoint.best
    if best is None:
        return
    if not recipe.checkpoint.every:
        yield Finding(
            (BEST, "checkpoint.every"),
            f"{BEST} = {json.dumps(best)} keeps a checkpoint, and checkpoint.every 0 keeps none: set checkpoint.every, or "
            f"remove {BEST}",
        )
    if best not in figures(recipe):
        yield Finding((BEST, "data.task"), unmeasured(best, figures(recipe), f'data.task "{recipe.data.task}"'))
    elif best in OF_TRANSLATIONS and not recipe.train.eval_translations:
        yield Finding(
            (BEST, "train.eval_translations"),
            f"{BEST} = {json.dumps(best)} is measured on translations, and train.eval_translations 0 asks for none: set it to "
            "the number of pairs that are translated at each evaluation",
        )


def unmeasured(best: str, legal: Mapping[str, Better], where: str) -> str:
    """Return the line for a figure that evaluations do not have. `where`: what they are of."""
    meant = nearest(best, legal) or next((name for name in legal if name in (f"{EVAL}{best}", best.lower())), None)
    advice = f"did you mean {json.dumps(meant)}? legal" if meant else "legal"
    return (
        f"{BEST} = {json.dumps(best)}: the evaluations of {where} have no such figure; {advice}: "
        f"{', '.join(map(json.dumps, legal))}"
    )
