"""`triaxis data inspect RECIPE`: what is shown is what training's loader gives, for every task."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.loss import IGNORE
from trainer.cli import main
from trainer.data import prepare
from trainer.data.loader import MicroBatch, TrainData
from trainer.data.targets import targets_of
from trainer.recipe import load

S = 64
EVIL = "evil \x1b[31mred\x1b[0m \x07 \x9b1m \u202e <script>alert(1)</script> <|endoftext|>"
CONVERSATIONS = [{"prompt": f"twice {i}?", "completion": f"It is {2 * i}."} for i in range(1, 41)]
CONVERSATIONS[4] = {"prompt": EVIL[:20], "completion": "An answer that is too long. " * 9}
CONVERSATIONS[6] = {"prompt": "nobody?", "completion": " "}
CONVERSATIONS[8] = {"prompt": "q", "completion": EVIL[20:]}
TEXTS = [{"text": f"Document {i}. " + "It says something, naïvely. 🙂 " * (i % 5)} for i in range(30)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": TEXTS,
    "mlm": TEXTS,
    "sft": CONVERSATIONS,
    "preference": [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad" + "x" * (i % 7)} for i in range(20)],
    "classify": [{"text": f"{i} is " + "nice " * (i % 9), "label": ("no", "yes")[i % 2]} for i in range(30)],
    "translate": [{"source": f"number {i}", "target": f"Zahl {i}, " * (i % 4 + 1)} for i in range(30)],
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
HALVES = {f"{side}_{name}": 32 for side in ("encoder", "decoder") for name in ("ffn_dim",)}
LAYERS = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
MODELS = {
    "mlm": {"family": "bert", "config": SMALL},
    "translate": {"family": "marian", "config": {"d_model": 32, **HALVES, **LAYERS}},
}


def recipe_of(task: str, folder: Path, rows: list[dict[str, Any]] | None = None, **data: Any) -> Path:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[task]), encoding="utf-8")
    value = {
        "run": {"name": "seen", "dir": str(folder / "runs")},
        "model": MODELS.get(task, {"family": "llama", "config": SMALL}),
        "data": {"task": task, "sources": [{"path": str(source)}], "seq_len": S, "workers": 1, **data},
        "batch": {"global_sequences": 4},
        "train": {"steps": 3},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(value))
    return path


def loaded(path: Path) -> list[MicroBatch]:
    """The sequences of the first two steps, as a run's own loader gives them."""
    recipe = load(path).recipe
    data = recipe.data
    found = prepare(data, seed=0, cache_dir=Path(str(data.cache_dir)), build=False, progress=lambda *_: None)
    order = TrainData(
        found.train,
        found.weights,
        row_tokens=data.row_tokens,
        seed=recipe.run.seed,
        isolate_documents=True,
        global_sequences=4,
        targets=targets_of(data, found.tokenizer, causal=data.task != "mlm", seed=recipe.run.seed, part="training"),
    )
    return [one for step in range(2) for one in order.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1)]


def shown(text: str) -> list[tuple[list[int], list[bool]]]:
    """The ids of each sequence that are shown, and which of them are marked as learned."""
    found = []
    for block in text.split("── ")[1:]:
        ids: list[int] = []
        learned: list[bool] = []
        for line in re.findall(r"^ids: (.*)$", block, re.MULTILINE):
            for marked, run in re.findall(r"(⟦)?([\d ]+)⟧?", line):
                ids += map(int, run.split())
                learned += [bool(marked)] * len(run.split())
        found.append((ids, learned))
    return found


@pytest.mark.parametrize("task", sorted(ROWS))
def test_what_is_shown_is_what_the_loader_gives(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(task, tmp_path)
    assert main(["data", "inspect", str(recipe), "--rows", "6"]) == 0
    out = capsys.readouterr().out
    sequences, batches = shown(out), loaded(recipe)[:6]
    assert len(sequences) == 6
    for (ids, learned), batch in zip(sequences, batches, strict=True):
        tokens, labels = batch.tokens_BS[0].numpy(), batch.targets_BS[0].numpy()
        filler = [begin for begin, size in runs(batch) if task not in ("pretrain", "mlm") and is_filler(tokens, begin, size)]
        kept = np.concatenate([np.arange(begin, begin + size) for begin, size in runs(batch) if begin not in filler])
        assert ids == tokens[kept].tolist()
        is_target = labels != IGNORE
        if task == "classify":
            assert not any(learned)
            assert [int(n) for n in re.findall(r"predicted at token (\d+)", out)][: is_target.sum()]
            continue
        expected = is_target if task == "mlm" else np.concatenate([[False], is_target[:-1]])
        assert learned == expected[kept].tolist()
    if task == "classify":
        said = [(int(n), int(at)) for n, at in re.findall(r"\(class (\d+), predicted at token (\d+)\)", out)]
        places = [
            (int(batch.targets_BS[0, at]), at) for batch in batches for at in np.flatnonzero(batch.targets_BS[0] != IGNORE)
        ]
        assert said == places


def runs(batch: MicroBatch) -> list[tuple[int, int]]:
    lengths = batch.documents.lengths[0]
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))


def is_filler(tokens: np.ndarray, begin: int, size: int) -> bool:
    return bool((tokens[begin : begin + size] == 256).all())


@pytest.mark.parametrize("task", ["sft", "pretrain"])
def test_each_document_names_its_row(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(task, tmp_path, seq_len=256)
    assert main(["data", "inspect", str(recipe), "--rows", "8"]) == 0
    found = re.findall(
        r"^tokens .*: (?:conversation|document), rows\.jsonl, row (\d+)\n((?:(?:its|cut) .*\n)*)(.*\n.*)", _out(capsys), re.M
    )
    assert len(found) > 8
    for number, elsewhere, text in found:
        row = ROWS[task][int(number) - 1]
        if task == "sft":
            assert row["prompt"][:4] in text
        elif "first" not in elsewhere:
            assert text.replace("⟦", "").startswith(row["text"][:12])


def _out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_row_is_followed_to_its_sequence_with_its_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of("sft", tmp_path, seq_len=128)
    assert main(["data", "inspect", str(recipe), "--row", "5"]) == 0
    out = _out(capsys)
    assert "rows.jsonl: 40 conversations read, 1 of them left out: " in out
    assert re.search(r"\d+ conversations packed, each whole, into \d+ sequences of 128 tokens", out)
    assert "cut after 128 tokens: " in out
    assert "\ncut off: " in out
    assert main(["data", "inspect", str(recipe), "--row", "2"]) == 0
    out = _out(capsys)
    assert "conversation, rows.jsonl, row 2\nuser\ntwice 2?<|endoftext|>assistant\n⟦It is 4.<|endoftext|>⟧\n" in out
    assert re.search(r": neighbour: conversation, rows.jsonl, row \d+: user twice \d+\?", out)
    step, index = map(int, re.findall(r"── step (\d+), sequence (\d+) of 4", out)[0])
    if step <= 2:
        batch = loaded(recipe)[(step - 1) * 4 + index - 1]
        assert bytes(t for t in batch.tokens_BS[0].tolist() if t < 256).count(b"twice 2?") == 1
    assert main(["data", "inspect", str(recipe), "--row", "7"]) == 0
    assert "it is in no sequence\n1 of 1 conversations left out: no answer" in _out(capsys)
    half = [str(recipe), "--set", "data.eval_fraction=0.5", "--row"]
    assert any(
        main(["data", "inspect", *half, str(n)]) == 0 and "held out, never learned" in _out(capsys) for n in range(1, 41)
    )
    assert main(["data", "inspect", str(recipe), "--row", "41"]) == 78
    assert "--row 41: data.sources have 40 rows" in capsys.readouterr().err


def test_data_drives_neither_terminal_nor_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("sft", tmp_path, seq_len=256)
    assert main(["data", "inspect", str(recipe), "--row", "9"]) == 0
    plain = _out(capsys)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", plain)
    assert r"\x9b1m \u202e <script>" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["data", "inspect", str(recipe), "--row", "9"]) == 0
    coloured = _out(capsys).partition("targets are shown")[2]
    assert "⟦" not in coloured
    assert set(re.findall(r"\x1b\[[\d;]*(.)", coloured)) == {"m"}
    assert re.search(r"\x1b\[[\d;]*42m", coloured), "the targets stand on green"
    page = tmp_path / "page.html"
    assert main(["data", "inspect", str(recipe), "--row", "9", "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert '">&lt;</span>' in html
    assert 'class="learned"' in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    assert not re.search(r"(src|href)=", html), "self-contained"


def test_a_folder_is_verified_in_units_of_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of("sft", tmp_path)
    assert main(["data", "prepare", str(recipe)]) == 0
    capsys.readouterr()
    folder = tmp_path / "runs" / "data"
    assert main(["data", "inspect", str(folder)]) == 0
    assert re.search(
        r"main: 38 examples in \d+ sequences of 64 tokens, [\d,]+ of them targets, [\d,]+ to fill up", _out(capsys)
    )
    assert main(["data", "inspect", str(folder), "--row", "1"]) == 78
    assert "--row needs a recipe" in capsys.readouterr().err
    for rows in folder.glob("*/rows"):  # as an earlier version left it
        shutil.rmtree(rows)
    assert main(["data", "inspect", str(recipe)]) == 65
    assert "an earlier version tokenized it" in capsys.readouterr().err
