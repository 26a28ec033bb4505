"""The loss scale against an independent reference, over thousands of random runs."""

from __future__ import annotations

import random

import pytest

from tests.unit.loss_scales import reference
from trainer.engine.loss_scale import LossScaler
from trainer.schema import Precision


def test_equals_the_reference_on_random_runs() -> None:
    stream = random.Random(0)
    halved = doubled = floored = 0
    for _ in range(5000):
        start, minimum = 2.0 ** stream.randint(2, 16), 2.0 ** stream.randint(-2, 2)
        window, hysteresis = stream.randint(1, 6), stream.randint(1, 4)
        chance = stream.choice([0.02, 0.2, 0.5, 0.9])
        overflows = [stream.random() < chance for _ in range(stream.randint(1, 60))]
        scaler, got = LossScaler(start, window, hysteresis, minimum), []
        for overflow in overflows:
            scaler.update(overflow=overflow)
            got.append(scaler.scale)
        expected = reference(start, window, hysteresis, minimum, overflows)
        assert got == expected, (start, window, hysteresis, minimum, overflows)
        assert min(got) >= minimum
        halved += any(b < a for a, b in zip([start, *got], got, strict=False))
        doubled += any(b > a for a, b in zip([start, *got], got, strict=False))
        floored += minimum in got
    assert min(halved, doubled, floored) > 500, "the random runs must reach every branch"


def test_of_a_recipe() -> None:
    dynamic = Precision.model_validate(
        {"dtype": "fp16", "loss_scale": {"initial_power": 5, "window": 7, "hysteresis": 3, "minimum": 2}}
    )
    assert LossScaler.from_recipe(dynamic) == LossScaler(32.0, 7, 3, 2.0)
    static = Precision.model_validate({"dtype": "fp16", "loss_scale": {"static": 128.0}})
    assert LossScaler.from_recipe(static) == LossScaler(128.0)
    assert LossScaler.from_recipe(Precision(dtype="bf16")) == LossScaler(1.0)


@pytest.mark.parametrize("precision", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp16", "loss_scale": {"static": 64.0}}])
def test_a_fixed_scale_never_changes(precision: dict[str, object]) -> None:
    scaler = LossScaler.from_recipe(Precision.model_validate(precision))
    before = scaler.scale
    for overflow in (True, False, True, True, *[False] * 5000):
        scaler.update(overflow=overflow)
        assert scaler.scale == before
