"""The speed of one rank on the cores of this machine, measured alone or while others measure the
same: what training is made of, by size.

The fused kernel of attention, operations that make a tensor and those that change one, and the
joining of gradients have rates of their own on a CPU, far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.doctor.speed import ON_HOST, Figures, adam_rate, call_s, product_s, typical_s
from trainer.engine.execution import DTYPES
from trainer.schema import Dtype

CPU = torch.device("cpu")
BUDGET_S = 0.12  # of one figure
SLOW_FLOPS = 4e9  # of a format whose large products are left out: that of fp16 on most CPUs
HEADS = 4
ATTENTION = ((64, 64), (128, 32), (256, 64), (512, 64), (1024, 64), (512, 128))  # length, head dim
MOVED = tuple(1 << n for n in (14, 18, 21, 23, 25, 26, 27, 28))  # bytes read and written
ADAM = (100_000, 1_000_000, 8_000_000)
FUNCTION_ELEMENTS = 1 << 18

Wait = Callable[[], object]


def rank_speed(ranks: int, formats: Sequence[Dtype], wait: Wait = lambda: None) -> Figures:
    """Return the speed of this process, of `ranks` that measure at the same time. `wait`: for all
    of them to come to the next figure."""
    return {
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "products": list(_products(formats, wait)),
        "attention": list(_attention(formats, wait)),
        "moves": list(_moves(formats, wait)),
        "functions_per_s": {dtype: _functions(dtype, wait) for dtype in formats},
        "adam": [{"elements": n, "elements_per_s": _timed(wait, lambda n=n: adam_rate(CPU, n))} for n in ADAM],  # type: ignore[misc]
        "call_s": call_s(CPU),
    }


def _timed(wait: Wait, measure: Callable[[], float]) -> float:
    wait()
    return measure()


def _typical_s(wait: Wait, action: Callable[[], object]) -> float:
    wait()
    return typical_s(action, CPU, BUDGET_S)


def _products(formats: Sequence[Dtype], wait: Wait) -> Iterator[Figures]:
    for dtype in formats:
        slow = False
        for shape in ON_HOST:
            if slow and shape.flops > SLOW_FLOPS / 100:
                continue
            wait()
            seconds = product_s(CPU, shape, dtype, BUDGET_S)
            slow = slow or (shape.flops > 1e6 and shape.flops / seconds < SLOW_FLOPS)
            yield {"dtype": dtype, **asdict(shape), "flops_per_s": shape.flops / seconds}


def _attention(formats: Sequence[Dtype], wait: Wait) -> Iterator[Figures]:
    """Yield the rates of causal attention, the whole square of pairs counted: 2 products forward, 5
    backward."""
    for dtype in formats:
        for length, head_dim in ATTENTION:
            shape = (max(1, 512 // length), length, HEADS, head_dim)
            # As `parallel.attention` has them: heads stand behind tokens.
            q, k, v = (torch.randn(shape).to(DTYPES[dtype]).transpose(1, 2).requires_grad_() for _ in range(3))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            grad = torch.ones_like(out)

            def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
                with torch.no_grad():
                    functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            def backward(out: Tensor = out, of: Sequence[Tensor] = (q, k, v), grad: Tensor = grad) -> None:
                torch.autograd.grad(out, of, grad, retain_graph=True)

            flops = 4 * shape[0] * HEADS * length * length * head_dim
            yield {
                "dtype": dtype,
                "length": length,
                "head_dim": head_dim,
                "forward_flops_per_s": flops / _typical_s(wait, forward),
                "backward_flops_per_s": 2.5 * flops / _typical_s(wait, backward),
            }


def _moves(formats: Sequence[Dtype], wait: Wait) -> Iterator[Figures]:
    """Yield the bytes moved a second by an operation into new memory (a · b), into memory that is
    there (a copy), and by joining what attention returned with heads before tokens."""
    for dtype in formats:
        itemsize = torch.finfo(DTYPES[dtype]).bits // 8
        for size in MOVED:
            a, b = (torch.ones(max(64, size // (3 * itemsize)), dtype=DTYPES[dtype]) for _ in range(2))
            source, target = (torch.ones(max(64, size // (2 * itemsize)), dtype=DTYPES[dtype]) for _ in range(2))
            tokens = max(1, size // (4 * itemsize * HEADS * 64))
            parts = [torch.ones(HEADS, tokens, 64, dtype=DTYPES[dtype]).transpose(0, 1) for _ in range(2)]
            actions: dict[str, tuple[Callable[[], Any], int]] = {
                "fresh": (lambda a=a, b=b: a * b, 3 * a.numel()),  # type: ignore[misc]
                "reused": (lambda s=source, t=target: t.copy_(s), 2 * source.numel()),  # type: ignore[misc]
                "joined": (lambda p=parts: torch.cat(p, 1), 4 * parts[0].numel()),  # type: ignore[misc]
            }
            for kind, (action, elements) in actions.items():
                moved = elements * itemsize
                yield {"kind": kind, "dtype": dtype, "bytes": moved, "bytes_per_s": moved / _typical_s(wait, action)}


def _functions(dtype: Dtype, wait: Wait) -> float:
    """Return the evaluations of an activation a second, beside moving its tensors."""
    values = torch.linspace(-4, 4, FUNCTION_ELEMENTS).to(DTYPES[dtype])
    evaluated = _typical_s(wait, lambda: functional.silu(values))
    moved = _typical_s(wait, lambda: values * 1.5)
    return FUNCTION_ELEMENTS / max(evaluated - moved, 0.1 * evaluated)
