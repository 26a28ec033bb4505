"""The functions between matrix products, which `torch.compile` may fuse into one pass over memory.

They are pure functions of tensors, called inside autograd functions: no parameter that ZeRO-3 has
divided, no collective and no list of documents is among their arguments. So they compile once for
all layers and micro-batches, whatever surrounds them: hooks, recomputation, a pipeline's schedule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

BACKEND = "inductor"  # of torch.compile
P = ParamSpec("P")
R = TypeVar("R")


class Fusing:
    """A switch: this process fuses now, or why it no longer can."""

    def __init__(self) -> None:
        self.on = False
        self.failure: str | None = None  # the first line of the compiler's error

    @contextmanager
    def __call__(self, wanted: bool) -> Iterator[None]:
        """Set the switch inside this context, if it is wanted and nothing has failed."""
        before, self.on = self.on, wanted and self.failure is None
        if self.on:
            _settle_compiler()
        try:
            yield
        finally:
            self.on = before

    def fail(self, error: Exception) -> None:
        self.on = False
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.failure = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


# One for the process, as torch's own cache of compiled code is: backward runs in threads of torch.
FUSING = Fusing()


def fusable(function: Callable[P, R], *, unfused: Callable[P, R] | None = None) -> Callable[P, R]:
    """Return the function, which is compiled while `FUSING` is on. Where that fails, and otherwise,
    it is computed as it is written, or as `unfused` has it. The result has no gradient."""
    written = function if unfused is None else unfused
    compiled: list[Callable[..., R]] = []

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not FUSING.on:
            return written(*args, **kwargs)
        try:
            if not compiled:
                compiled.append(torch.compile(function, fullgraph=True, backend=BACKEND))
            return compiled[0](*map(_plain, args), **kwargs)
        except Exception as error:  # anything: torch, the C++ compiler, the disk
            FUSING.fail(error)
            return written(*args, **kwargs)

    return update_wrapper(call, function)


def _plain(value: Any) -> Any:
    """Return a tensor without what code is specialised to beside its shape: a parameter, frozen or
    not."""
    return value.detach() if isinstance(value, Tensor) else value


def _settle_compiler() -> None:
    """Set the compiler to work in this process, without a pool that outlives it, and in a
    folder of the user's own."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_code_folder()))


def compiled_code_folder() -> Path:
    """Return the folder of compiled code, which torch would put into /tmp."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "triaxis" / "compiled"
