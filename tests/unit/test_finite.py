"""Numbers that a format does not have are refused where they come from: recipes, folders of weights, exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from parallel.pieces import Piece
from trainer.errors import DataError, NotFinite, RecipeError
from trainer.model.finite import Rounding
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import PretrainedWeights
from trainer.recipe import load
from trainer.recipe.numbers import KEYS


def refusal(tmp_path: Path, *settings: str) -> list[str]:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": {"family": "gpt2"}}))
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "recipe.json", list(settings))
    return caught.value.lines


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("optimizer.eps=1e-50", "optimizer.eps = 1e-50 is 0 in fp32"),
        ("optimizer.eps=1e-40", "optimizer.eps = 1e-40 is 0 in fp32"),  # subnormal: 0 for kernels that are built for speed
        ("optimizer.lr=1e-46", "optimizer.lr = 1e-46 is 0 in fp32"),
        ("optimizer.lr=1e39", "optimizer.lr = 1e+39 is infinite in fp32"),
        ("optimizer.weight_decay=1e-60", "optimizer.weight_decay = 1e-60 is 0 in fp32"),
        ("optimizer.betas=[0.9,0.999999999]", "optimizer.betas[1] = 0.999999999 is 1 in fp32"),
        ("train.clip_norm=1e-44", "train.clip_norm = 1e-44 is 0 in fp32"),
        ("train.label_smoothing=0.9999999999", "train.label_smoothing = 0.9999999999 is 1 in fp32"),
    ],
)
def test_a_recipe_s_number_that_fp32_does_not_have_is_refused(setting: str, told: str, tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, setting)
    assert told in line
    assert "legal: " in line


def test_the_same_holds_for_every_key_that_a_device_computes_with(tmp_path: Path) -> None:
    for key in KEYS:
        value = "[1e-300,1e-300]" if "betas" in key else "1e-300"
        assert any("is 0 in fp32" in line for line in refusal(tmp_path, f"{key}={value}")), key


@pytest.mark.parametrize("setting", ["optimizer.eps=1e-37", "optimizer.betas=[0.0,0.9999]", "optimizer.weight_decay=0.0"])
def test_others_pass(setting: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": {"family": "gpt2"}}))
    load(tmp_path / "recipe.json", [setting])


def test_a_network_s_numbers_too() -> None:
    with pytest.raises(RecipeError, match=r"rms_norm_eps = 1e-50: must be a number that fp32 has: 1.18e-38 to 3.4e\+38"):
        from_hf("llama", {"rms_norm_eps": 1e-50})


def weights(folder: Path, **tensors: torch.Tensor) -> PretrainedWeights:
    save_file(tensors, folder / "model.safetensors")
    return PretrainedWeights(folder)


@pytest.mark.parametrize(
    ("dtype", "value", "told"),
    [
        (torch.float64, 1e300, "tensor w has values up to 1e+300, and fp32 ends at 3.403e+38"),
        (torch.float64, math.inf, "tensor w holds NaN or infinity"),
        (torch.float32, math.nan, "tensor w holds NaN or infinity"),
        (torch.float64, 1e38, None),
    ],
)
def test_a_folder_s_weights_are_looked_at_as_they_are_trained(
    dtype: torch.dtype, value: float, told: str | None, tmp_path: Path
) -> None:
    found = weights(tmp_path, w=torch.tensor([1.0, value], dtype=dtype))
    piece = Piece("w", (2,), (0,), (2,))
    if told is None:
        assert found.read(piece).tolist() == [1.0, value]
        return
    with pytest.raises(DataError) as caught:
        found.read(piece)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "values", "kind", "told"),
    [
        (
            torch.float16,
            [1.0, 70000.0],
            DataError,
            "values up to 7e+04, and fp16 ends at 6.55e+04: export in bf16 or fp32",
        ),
        (torch.bfloat16, [3.4e38], DataError, "tensor w has values up to 3.4e+38, and bf16 ends at 3.39e+38: export in fp32"),
        (torch.bfloat16, [math.nan], NotFinite, "tensor w is not finite"),
        (torch.float32, [-math.inf], NotFinite, "tensor w is not finite"),
        (torch.float16, [65504.0, 1e-30], None, ""),
    ],
)
def test_rounding_remembers_the_first_that_does_not_survive(
    dtype: torch.dtype, values: list[float], kind: Any, told: str
) -> None:
    rounding = Rounding(dtype)
    assert rounding("before", torch.zeros(2)).dtype == dtype
    assert rounding("w", torch.tensor(values)).shape == (len(values),), "the other ranks are not kept waiting"
    rounding("after", torch.tensor([math.nan]) if kind else torch.zeros(1))
    if kind is None:
        rounding.require_survivors()
        return
    with pytest.raises(kind) as caught:
        rounding.require_survivors()
    assert told in str(caught.value)
