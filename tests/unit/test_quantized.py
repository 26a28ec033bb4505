"""Weights in few bits: values, blocks, layouts."""

from __future__ import annotations

import pytest
import torch

from parallel.mesh import Group
from parallel.params import Init, Role, ShardSpec
from parallel.pieces import Piece
from parallel.quantized import BLOCK, NF4, QuantizedWeight, dequantize, quantize
from trainer.tuning.targets import QUANTIZED_TOGETHER


def weight(rows: int = 6, features: int = 256) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize(("form", "half_step"), [("nf4", (1.0 - 0.6961928) / 2), ("int8", 0.5 / 127)])
def test_each_element_becomes_the_nearest_value(form: str, half_step: float) -> None:
    w = weight()
    codes, magnitudes = quantize(w, form)
    got = dequantize(codes, magnitudes, form)
    within = half_step * w.abs().view(6, -1, BLOCK).amax(-1).repeat_interleave(BLOCK, -1)
    assert ((got - w).abs() <= within * (1 + 1e-5)).all()
    if form == "nf4":
        table = torch.tensor(NF4)
        shares = (w.view(6, -1, BLOCK) / magnitudes.unsqueeze(-1)).flatten()
        nearest = table[(shares.unsqueeze(-1) - table).abs().argmin(-1)]
        torch.testing.assert_close(got.view(6, -1, BLOCK) / magnitudes.unsqueeze(-1), nearest.view(6, -1, BLOCK))


def test_the_table_is_made_of_quantiles_of_a_normal_distribution() -> None:
    """Dettmers et al. 2023, appendix E: eight of each sign, from 0 to the quantile at 0.9677083, where the largest is 1."""
    end, normal = 0.9677083, torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(end, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(end, 0.5, 8)[:-1])
    made = torch.cat([above, torch.zeros(1), below]).sort().values
    torch.testing.assert_close(made / made.max(), torch.tensor(NF4), rtol=0, atol=1e-6)


def test_two_codes_share_a_byte_the_first_above() -> None:
    w = torch.zeros(1, BLOCK)
    w[0, 0], w[0, 1] = 2.0, -2.0
    codes, magnitudes = quantize(w, "nf4")
    assert codes[0, :2].tolist() == [15 << 4 | 0, 7 << 4 | 7]
    assert magnitudes.tolist() == [[2.0]]


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_zeros_and_what_was_quantized_already_stay(form: str) -> None:
    assert not dequantize(*quantize(torch.zeros(2, BLOCK), form), form).any()
    once = quantize(weight(), form)
    again = quantize(dequantize(*once, form), form)
    torch.testing.assert_close(again, once)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_shard_has_its_part_of_the_whole(form: str) -> None:
    w = weight()
    whole, part = quantize(w, form), quantize(w[2:4, 128:192].contiguous(), form)
    spec = ShardSpec(Role.MATRIX, Init(), (Piece("w", (256, 6), (128, 2), (64, 2), transposed=True),), Group.alone())
    held = QuantizedWeight(spec, form, *part)
    for logical, (of_part, values) in zip(whole, held.stored.values(), strict=True):
        (piece,) = of_part.pieces
        assert piece.shape == tuple(logical.shape)
        assert torch.equal(piece.box_of(logical), values)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_weight_made_whole_is_rounded_once(form: str) -> None:
    spec = ShardSpec(Role.MATRIX, Init(), (), Group.alone())
    held = QuantizedWeight.of(weight(), spec, form)
    codes = held.codes if form == "int8" else torch.stack([held.codes >> 4, held.codes & 15], -1).view(6, -1)
    shares = codes.double() / 127 if form == "int8" else torch.tensor(NF4, dtype=torch.float64)[codes.long()]
    exact = shares * held.magnitudes.double().repeat_interleave(BLOCK, -1)
    # The last bit of fp32 may be another.
    torch.testing.assert_close(held.dequantized(torch.float32).double(), exact, rtol=2**-22, atol=0)
    assert torch.equal(held.dequantized(torch.bfloat16), held.dequantized(torch.float32).bfloat16())
    # Half a step of 8 bits, and what fp32 leaves undecided.
    torch.testing.assert_close(held.dequantized(torch.bfloat16).double(), exact, rtol=2**-8 + 2**-20, atol=0)


def test_a_row_must_be_made_of_whole_blocks() -> None:
    assert BLOCK == QUANTIZED_TOGETHER
    with pytest.raises(ValueError, match="100 input features are not a multiple of 64"):
        quantize(torch.zeros(2, 100), "nf4")
