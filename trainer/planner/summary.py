"""The plan in three lines: whether it fits, the memory of a rank, the time of a step. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.model.config import TransformerConfig
from trainer.planner.explain import explain
from trainer.planner.items import GIB
from trainer.planner.prediction import Prediction
from trainer.planner.verdict import verdict
from trainer.schema import Recipe

SHOWN = 8  # ranks of the pipeline whose memory is shown each


def summary(recipe: Recipe, network: TransformerConfig, prediction: Prediction) -> Iterator[str]:
    """Yield the three lines; of an unknown device the memory alone."""
    ranks = [rank.num_bytes / GIB for rank in prediction.ranks]
    if prediction.device is None:
        yield f"{_memory(ranks)}; no device is known, which --device or a site's file names: no verdict and no time"
        return
    yield verdict(prediction)
    yield _memory(ranks)
    yield explain(recipe, network, prediction).time


def facts(recipe: Recipe, network: TransformerConfig, prediction: Prediction) -> dict[str, Any]:
    """Return what the lines say, for programs: bytes and seconds."""
    explained = explain(recipe, network, prediction)
    return {
        "device": None if prediction.device is None else prediction.device.name,
        "fits": prediction.fits,
        "rank_bytes": [rank.num_bytes for rank in prediction.ranks],
        "step_s": explained.step_s,
        "band": explained.band,
        "mfu": explained.mfu,
    }


def _memory(ranks: list[float]) -> str:
    if len(ranks) == 1:
        return f"memory: {ranks[0]:,.2f} GiB on every rank"
    if len(ranks) <= SHOWN:
        return f"memory: {', '.join(f'{one:,.2f}' for one in ranks)} GiB on the ranks of the pipeline"
    return f"memory: {min(ranks):,.2f} to {max(ranks):,.2f} GiB on the {len(ranks)} ranks of the pipeline"
