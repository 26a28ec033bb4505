"""The speed of one rank on the cores of this machine, measured alone or while others measure the
same: what training is made of, by size.

The fused kernel of attention, operations that make a tensor and those that change one, and the
joining of gradients have rates of their own on a CPU, far apart. In a step each operation finds
tensors that others have used long before; so each figure is measured over many tensors in turn,
which no cache holds together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.attention import attend
from parallel.documents import Documents
from parallel.products import product
from trainer.doctor.speed import ON_HOST, Figures, lower_quartile, timed_s, typical_s
from trainer.engine.execution import DTYPES
from trainer.schema import Dtype

CPU = torch.device("cpu")
BUDGET_S = 0.1  # of one figure
SLOW_FLOPS = 4e9  # of a format whose large products are left out: that of fp16 on most CPUs
HEADS = 4
ATTENTION = ((64, 64), (128, 32), (256, 64), (512, 64), (1024, 64), (512, 128))  # length, head dim
MOVED = tuple(1 << n for n in (14, 18, 21, 23, 25, 26, 27, 28))  # bytes read and written
ADAM = (100_000, 1_000_000, 8_000_000)
FUNCTION_ELEMENTS = 1 << 18

RING_BYTES = 96 << 20  # of the tensors that are used in turn
MOST_IN_RING = 64
LAYERS = 20  # of small operations
STEADY, STEADY_S = 1024, 1.5  # the side of the products that are repeated for so long

Wait = Callable[[], object]
Operands = list[Tensor]


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
        "adam": [{"elements": elements, "elements_per_s": _adam(elements, wait)} for elements in ADAM],
        "call_s": _call_s(wait),
        "steady": _steady(wait),
    }


def _typical_s(wait: Wait, action: Callable[[], object]) -> float:
    wait()
    return typical_s(action, CPU, BUDGET_S)


def _in_turn(num_bytes: float, made: Callable[[], Operands], action: Callable[[Operands], object]) -> Callable[[], object]:
    """Return the action on one set of tensors after another. `num_bytes`: of a set."""
    number = min(MOST_IN_RING, max(2, int(RING_BYTES // num_bytes)))
    ring = itertools.cycle([made() for _ in range(number)])
    return lambda: action(next(ring))


def _products(formats: Sequence[Dtype], wait: Wait) -> Iterator[Figures]:
    """Yield the rate of each shape in each format. Where a format is slow (fp16 on most CPUs) its
    large shapes are left out."""
    for dtype in formats:
        slow = False
        for shape in ON_HOST:
            if slow and shape.flops > SLOW_FLOPS / 100:
                continue
            rows, columns, inner = shape.rows, shape.columns, shape.inner

            def made(sizes: Sequence[tuple[int, int]] = ((rows, inner), (columns, inner)), dtype: Dtype = dtype) -> Operands:
                return [torch.ones(size, dtype=DTYPES[dtype]) for size in sizes]

            moved = 4 * (rows * inner + columns * inner + rows * columns)
            seconds = _typical_s(wait, _in_turn(moved, made, lambda pair: product(pair[0], pair[1].mT)))
            slow = slow or (shape.flops > 1e6 and shape.flops / seconds < SLOW_FLOPS)
            yield {"dtype": dtype, **asdict(shape), "flops_per_s": shape.flops / seconds}


def _attention(formats: Sequence[Dtype], wait: Wait) -> Iterator[Figures]:
    """Yield the rates of causal attention, the whole square of pairs counted: 2 products forward, 5
    backward."""
    for dtype in formats:
        for length, head_dim in ATTENTION:
            shape = (max(1, 512 // length), length, HEADS, head_dim)
            documents = Documents.whole_rows(*shape[:2])
            q, k, v = (torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for _ in range(3))
            out = attend(q, k, v, documents, causal=True)
            grad = torch.ones_like(out)

            def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, documents: Documents = documents) -> None:
                with torch.no_grad():
                    attend(q, k, v, documents, causal=True)

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
            for kind, (made, action, moved) in _kinds(size // itemsize, DTYPES[dtype]).items():
                num_bytes = moved * itemsize
                seconds = _typical_s(wait, _in_turn(num_bytes, made, action))
                yield {"kind": kind, "dtype": dtype, "bytes": num_bytes, "bytes_per_s": num_bytes / seconds}


def _kinds(elements: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Operands], Callable[[Operands], object], int]]:
    """Return the moves of about so many elements: what makes their operands, the move, and how many
    elements it reads and writes."""
    third, half, tokens = elements // 3, elements // 2, max(1, elements // (4 * HEADS * 64))
    return {
        "fresh": (lambda: [torch.ones(third, dtype=dtype) for _ in range(2)], lambda pair: pair[0] * pair[1], 3 * third),
        "reused": (lambda: [torch.ones(half, dtype=dtype) for _ in range(2)], lambda pair: pair[0].copy_(pair[1]), 2 * half),
        "joined": (
            lambda: [torch.ones(HEADS, tokens, 64, dtype=dtype).transpose(0, 1) for _ in range(2)],
            lambda pair: torch.cat(pair, 1),
            4 * HEADS * tokens * 64,
        ),
    }


def _functions(dtype: Dtype, wait: Wait) -> float:
    """Return the evaluations of an activation a second, beside moving its tensors."""
    values = torch.linspace(-4, 4, FUNCTION_ELEMENTS).to(DTYPES[dtype])
    evaluated = _typical_s(wait, lambda: functional.silu(values))
    moved = _typical_s(wait, lambda: values * 1.5)
    return FUNCTION_ELEMENTS / max(evaluated - moved, 0.1 * evaluated)


def _adam(elements: int, wait: Wait) -> float:
    """Return the weights that torch's fused AdamW, with fp32 states, updates in a second, in
    tensors of so many."""
    weights = [torch.zeros(elements, requires_grad=True) for _ in range(max(1, ADAM[-1] // elements))]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    rule = torch.optim.AdamW(weights, fused=True)
    return len(weights) * elements / _typical_s(wait, rule.step)


def _call_s(wait: Wait) -> float:
    """Return the seconds in which Python issues an operation of a module under autograd: of small
    layers, three forward and five backward."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(LAYERS)]
    given = torch.zeros(4, 8, requires_grad=True)

    def pass_through() -> None:
        x = given
        for layer in layers:
            x = x + 2.0 * layer(x)
        x.sum().backward()

    return _typical_s(wait, pass_through) / (8 * LAYERS)


def _steady(wait: Wait) -> dict[str, float]:
    """Return the mean seconds of a product, and their lower quartile: other figures are of short
    times, and a step is long enough that it meets all that stops a machine for a moment."""
    wait()
    times = steady_times()
    return {"seconds": sum(times) / len(times), "quartile_s": lower_quartile(times)}


def steady_times() -> list[float]:
    """Return the seconds of each of the products that are repeated for a while."""
    ring = [(torch.ones(STEADY, STEADY), torch.ones(STEADY, STEADY)) for _ in range(8)]
    for left, right in ring:
        product(left, right.mT)
    times: list[float] = []
    while sum(times) < STEADY_S:
        left, right = ring[len(times) % len(ring)]
        times.append(timed_s(lambda left=left, right=right: product(left, right.mT), CPU))  # type: ignore[misc]
    return times
