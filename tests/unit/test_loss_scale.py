import random

import pytest

from trainer.loss_scale import LossScaler
from trainer.sections import LossScale, Precision


def reference(overflows: list[bool], scale: float, window: int, hysteresis: int, minimum: float) -> list[float]:
    """The rule, said in another way: look back over the whole history at every step."""
    scales = []
    tolerated, since = hysteresis - 1, 0
    for overflow in overflows:
        since = 0 if overflow else since + 1
        if overflow and tolerated > 0:
            tolerated -= 1
        elif overflow:
            scale = scale / 2 if scale / 2 > minimum else minimum
        elif since % window == 0:
            scale, tolerated, since = scale * 2, hysteresis - 1, 0
        scales.append(scale)
    return scales


def test_it_follows_the_rule_over_random_histories() -> None:
    stream = random.Random(0)
    for _ in range(500):
        initial, window, hysteresis = 2.0 ** stream.randint(0, 16), stream.randint(1, 9), stream.randint(1, 4)
        minimum = float(stream.choice([1, 4]))
        overflows = [stream.random() < stream.choice([0.02, 0.3, 0.8]) for _ in range(60)]
        scaler = LossScaler(initial, window, hysteresis, minimum)
        got = []
        for overflow in overflows:
            scaler.update(overflow=overflow)
            got.append(scaler.scale)
        assert got == reference(overflows, initial, window, hysteresis, minimum), (initial, window, hysteresis)


def test_it_never_falls_below_the_minimum() -> None:
    scaler = LossScaler(8.0, window=10, hysteresis=1, minimum=4.0)
    for _ in range(5):
        scaler.update(overflow=True)
    assert scaler.scale == 4.0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_formats_are_not_scaled(dtype: str) -> None:
    scaler = LossScaler.from_recipe(Precision(dtype=dtype))
    for overflow in (True, False, False):
        scaler.update(overflow=overflow)
        assert scaler.scale == 1.0


def test_the_recipe_s_keys_reach_it() -> None:
    keys = LossScale(initial_power=3, window=5, hysteresis=4, minimum=2)
    assert LossScaler.from_recipe(Precision(dtype="fp16", loss_scale=keys)) == LossScaler(8.0, 5, 4, 2)
    static = LossScaler.from_recipe(Precision(dtype="fp16", loss_scale=LossScale(static=128.0)))
    for overflow in (True, True, False):
        static.update(overflow=overflow)
        assert static.scale == 128.0
