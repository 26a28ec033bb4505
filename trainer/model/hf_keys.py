"""The translation of one key of a Hugging Face config: its value in our terms, and the value to
write back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.model.single_precision import LARGEST, SMALLEST, in_range, rounded

# A function that reads a value returns it in our terms, or raises ValueError with the legal values.


@dataclass(frozen=True)
class Whole:
    """A size, `smallest` to `limit`. `optional`: null stands for a value derived from others.

    The limits are about ten times the largest published sizes, so that a slip of the finger is
    refused instead of filling the memory.
    """

    limit: int
    optional: bool = False
    smallest: int = 1

    def __call__(self, value: Any) -> int | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("a whole number")
        if not self.smallest <= value <= self.limit:
            raise ValueError(f"{self.smallest} to {self.limit}")
        return value


def rate(value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError("a number in [0, 1)")
    if rounded(value) == 1.0:
        raise ValueError("a number in [0, 1) that is not 1 in fp32")
    return float(value)


def optional_rate(value: Any) -> float | None:
    return None if value is None else rate(value)


def positive(value: Any) -> float:
    if not _is_number(value) or not 0.0 < value < float("inf"):
        raise ValueError("a number above 0")
    if not in_range(value):
        raise ValueError(f"a number that fp32 has: {SMALLEST:.3g} to {LARGEST:.3g}")
    return float(value)


def at_least_one(value: Any) -> float:
    if not _is_number(value) or not 1.0 <= value <= LARGEST:
        raise ValueError(f"a number of at least 1 that fp32 has: up to {LARGEST:.3g}")
    return float(value)


def standard_deviation(value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError("a number in [0, 1]")
    return float(value)


def soft_cap(value: Any) -> float | None:
    return None if value is None else positive(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def optional_flag(value: Any) -> bool | None:
    return None if value is None else flag(value)


# Hugging Face's names for one function; the first name of each is the one written back.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError("one of " + ", ".join(ACTIVATIONS))
    return ACTIVATIONS[value]


def activation_name(value: str) -> str:
    return next(name for name, ours in ACTIVATIONS.items() if ours == value)


GATED = "gated-"


def feed_forward(value: Any) -> tuple[bool, str]:
    """Return whether the MLP is gated, and its activation. T5's name for the gated GELU means the
    tanh approximation."""
    if value == "gated-gelu":
        return True, "gelu_tanh"
    if not isinstance(value, str) or value.removeprefix(GATED) not in ACTIVATIONS:
        raise ValueError(f"one of {', '.join(ACTIVATIONS)}, or {GATED} and one of them")
    return value.startswith(GATED), ACTIVATIONS[value.removeprefix(GATED)]


def feed_forward_name(value: tuple[bool, str]) -> str:
    gated, function = value
    if gated and function == "gelu_tanh":
        return "gated-gelu"
    return GATED * gated + activation_name(function)


def gemma_activation_name(value: str) -> str:
    """Return the name that Gemma's own folders use."""
    return "gelu_pytorch_tanh" if value == "gelu_tanh" else activation_name(value)


def gemma_window(value: int | None) -> int:
    """Return the window to write: transformers needs one even where `layer_types` gives it to no
    layer."""
    return 4096 if value is None else value


LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_types(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(kind in LAYER_TYPES for kind in value):
        raise ValueError("null or a list with one of " + ", ".join(LAYER_TYPES) + " for each layer")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """The translation of one Hugging Face key: our field(s), transformers' own default, and the
    functions that read and write its value."""

    fields: tuple[str, ...]
    default: Any
    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = as_it_is


def key(name: str, default: Any, read: Callable[[Any], Any], write: Callable[[Any], Any] = as_it_is) -> Key:
    return Key((name,), default, read, write)
