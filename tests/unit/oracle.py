"""Networks of transformers as an oracle: with random weights, beside ours with the same, and how near results must be.

Every weight is random, biases and norms too: one that is mixed up or left out would not show at 0 or 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.loss import IGNORE
from parallel.params import owned_specs
from tests.unit.shapes import B, S, V
from tests.unit.stages import stage_from
from trainer.model.families import FAMILIES
from trainer.model.transformer import Stage


def random_model(family: str, shape: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model in fp32 with every weight drawn at random around 0, those of norms around 1."""
    import transformers

    names = {"gpt2": ("GPT2Config", "GPT2LMHeadModel"), "llama": ("LlamaConfig", "LlamaForCausalLM")}[family]
    config = getattr(transformers, names[0])(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = getattr(transformers, names[1])(config).eval()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("weight") and ("norm." in name or ".ln_" in name)
            parameter.normal_(1.0 if is_norm else 0.0, 0.2, generator=stream)
    return model


def twins(family: str, shape: dict[str, Any], folder: Path) -> tuple[Any, Stage]:
    theirs = random_model(family, shape)
    theirs.save_pretrained(folder)
    return theirs, stage_from(folder)


def random_tokens(rows: int = B, length: int = S, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def next_labels(tokens_BS: Tensor, lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    """The next token of the same document; IGNORE at each document's end."""
    labels = torch.full_like(tokens_BS, IGNORE)
    for row, row_lengths in enumerate(lengths):
        end = 0
        for length in row_lengths:
            start, end = end, end + length
            labels[row, start : end - 1] = tokens_BS[row, start + 1 : end]
    return labels


def logical_gradients(stage: nn.Module) -> dict[str, Tensor]:
    """Our gradients as Hugging Face's tensors."""
    gradients: dict[str, Tensor] = {}
    for _, parameter, spec in owned_specs(stage):
        assert parameter.grad is not None
        for piece in spec.pieces:
            whole = gradients.setdefault(piece.name, torch.full(piece.shape, torch.nan, dtype=parameter.dtype))
            piece.box_of(whole).copy_(piece.in_parameter(parameter.grad))
    return gradients


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str, *, largest: float | None = None) -> None:
    """Within `tolerance` of the largest element, for rounding is relative to a sum's largest term, not to its result."""
    got, expected = got.detach(), expected.detach()
    allowed = tolerance * (float(expected.abs().max()) if largest is None else largest)
    worst = float((got - expected).abs().max())
    assert worst <= allowed, f"{what}: differs by {worst:.3g}, allowed {allowed:.3g}"


def largest_element(gradients: Mapping[str, Tensor], name: str) -> float:
    """That of a gradient; for the bias of keys that are not rotated, that of their queries' bias: it adds the same to all
    logits of a query, which softmax forgets, so that its own gradient is 0 but for rounding."""
    name = re.sub(r"\.self\.key\.bias$", ".self.query.bias", name)  # Bert
    name = re.sub(r"^(model\.(en|de)coder\..*)\.k_proj\.bias$", r"\1.q_proj.bias", name)  # Marian
    return float(gradients[name].abs().max())


def assert_same_gradients(stage: Stage, theirs: Any, tolerance: float) -> None:
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    got = logical_gradients(stage)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = largest_element(expected, name)
        assert largest > 1e-6, f"{name}: the oracle's gradient is 0 and would prove nothing"
        assert_close(got[name], gradient, tolerance, f"gradient of {name}", largest=largest)


def their_class(family: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].architecture)


def random_translator(family: str, shape: dict[str, Any]) -> Any:
    """In fp32 with every weight drawn at random around 0, those of norms around 1, the bias of the logits too."""
    from transformers import CONFIG_MAPPING

    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 0}
    if family == "marian":
        tokens["forced_eos_token_id"] = 0
    model = their_class(family)(CONFIG_MAPPING[family](**shape, **tokens)).eval()
    if shape.get("tie_word_embeddings") is False:  # transformers 5 ties it until a folder holds another
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" not in name:
                weight.normal_(float("norm" in name.lower() and name.endswith("weight")), 0.2, generator=stream)
    return model
