"""Checkpoints that are made without training: four small tensors with one optimizer state, cut over two files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.messages import Messages
from parallel.pieces import Fragment, Piece
from tools.campaign.damage import sealed
from trainer.checkpoint.folder import HUGGING_FACE, CheckpointFolder
from trainer.checkpoint.manifest import MANIFEST, File, LogicalTensor, Manifest, key_of
from trainer.checkpoint.runs import Stored
from trainer.checkpoint.save import Saver
from trainer.checkpoint.tensor_file import Slot, write_tensor_file
from trainer.engine.zero_state import StateFragment
from trainer.files.durable import private_file
from trainer.update_rules import WEIGHT

ALONE = Messages.alone()
SHAPES = {"wte.weight": (12, 40), "h.0.c_fc.weight": (20, 30), "ln_f.bias": (10,), "temperature": ()}
STATES = {WEIGHT: "F32", "exp_avg": "F32"}
RANKS = 2
FACTS = {"batch.global_sequences": 8, "precision.dtype": "fp32", "optimizer.name": "adamw"}


def values_of(name: str, state: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + list(SHAPES).index(name) * 10 + list(STATES).index(state))
    return torch.randn(SHAPES[name], generator=generator)


def write_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    seed: int | None = None,
    facts: dict[str, Any] = FACTS,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Path:
    """A whole checkpoint of that step; each tensor is two ranges, one in each file."""
    seed = step if seed is None else seed
    folder = CheckpointFolder(checkpoints)
    draft = folder.begin(step)
    files, stored = [], {name: tuple(_halves(name, shape)) for name, shape in SHAPES.items()}
    for rank in range(RANKS):
        parts = [(name, state, p) for name in SHAPES for state in STATES for file, p in stored[name] if file == rank]
        slots = {key_of(part, state): Slot("F32", (part.count,)) for _, state, part in parts}
        tensors = (values_of(name, state, seed).flatten()[p.offset : p.offset + p.count] for name, state, p in parts)
        files.append(write_tensor_file(draft / f"rank-{rank:05d}.safetensors", slots, tensors))
    (draft / HUGGING_FACE).mkdir(mode=0o700)
    for name, content in {"config.json": {"model_type": "gpt2"}, "tokenizer.json": {"step": step, "seed": seed}}.items():
        data = json.dumps(content).encode()
        with private_file(draft / HUGGING_FACE / name) as file:
            file.write(data)
        files.append(File.of(f"{HUGGING_FACE}/{name}", data))
    manifest = replace(
        blank(step),
        facts=facts,
        files=tuple(files),
        tensors={name: LogicalTensor.of(shape, dict(STATES), stored[name]) for name, shape in SHAPES.items()},
    )
    return folder.commit(draft, step, change(manifest).encode())


def blank(step: int = 0) -> Manifest:
    """A manifest without files."""
    return Manifest(
        step=step,
        sequences=8 * step,
        time=1.5e9 + step,
        recipe={"model": {}, "data": {}, "precision": {"dtype": "fp32"}},
        facts={"batch.global_sequences": 8},
        layout={"pp": 1, "dp": 2, "cp": 1, "tp": 1, "zero": 1},
        state={
            "updates": step,
            "loss_scale": {"scale": 1.0, "good_steps": 0, "overflows_left": 2},
            "memory": {"guard": {"skipped_in_a_row": 0, "loss": [2.5]}},
        },
        versions={"triaxis": "0"},
    )


def _halves(name: str, shape: tuple[int, ...]) -> Iterator[Stored]:
    numel = torch.Size(shape).numel()
    first = numel // 2
    for file, (offset, count) in enumerate([(0, first), (first, numel - first)]):
        if count:
            yield Stored(file, Fragment(Piece.whole(name, shape), offset, count))


def forged(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it again, so that it is not its checksum that gives it away."""
    body = json.loads((checkpoint / MANIFEST).read_bytes())
    change(body)
    (checkpoint / MANIFEST).write_bytes(sealed(body))


class State:
    """As much of a `ZeroState` as a saver needs: one weight."""

    def fragments(self) -> Sequence[StateFragment]:
        return [StateFragment(Fragment.whole(Piece.whole("w", (4,))), WEIGHT, torch.float32)]

    def tensors(self) -> Iterator[Tensor]:
        yield torch.arange(4.0)


def save(checkpoints: Path, step: int, *, keep: int = 2, asynchronous: bool = False, name: str = "config.json") -> str:
    """By the real saver; "" or why there is no checkpoint."""

    def beside(folder: Path) -> None:
        (folder / name).write_text("{}")
        (folder / name).chmod(0o666)

    saver = Saver(CheckpointFolder(checkpoints), ALONE, keep=keep, asynchronous=asynchronous)
    saves = saver.save(blank(step), State(), save_beside=beside) + saver.wait()  # type: ignore[arg-type]
    (only,) = saves
    return only.failure
