"""The files that drawn recipes name: small files of texts and rows for each task, and a Hugging
Face folder of each family."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.data.tokenizer_loading import make_tokenizer
from trainer.model.families import FAMILIES

NUMBERS = range(60)
ROWS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "texts": lambda n: {"text": f"{n} times {n} is {n * n}.", "question": f"{n}?"},
    "messages": lambda n: {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n * n}"}]},
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n * n}"}]},
    "prompt": lambda n: {"prompt": f"{n}?", "completion": f"{n * n}", "question": f"and {n}?"},
    "alpaca": lambda n: {"instruction": f"{n}?", "input": "", "output": f"{n * n}"},
    "pairs": lambda n: {"prompt": f"{n}?", "chosen": f"{n * n}", "rejected": "no", "question": f"and {n}?"},
    "translations": lambda n: {"source": f"{n} times", "target": f"{n} mal", "en": f"{n} of", "de": f"{n} von"},
    "labelled": lambda n: {"text": f"{n} is odd or not", "label": n % 3, "question": f"{n}?"},
}
# The files that each task reads.
FILES: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("text.txt", "text.txt.gz", "texts.jsonl", "texts.csv", "folder"),
    "mlm": ("text.txt", "texts.jsonl", "texts.csv", "folder"),
    "sft": ("messages.jsonl", "sharegpt.jsonl", "prompt.jsonl", "prompt.csv", "alpaca.jsonl"),
    "preference": ("pairs.jsonl", "pairs.csv"),
    "translate": ("translations.jsonl", "translations.csv", "lines.en"),
    "classify": ("labelled.jsonl", "labelled.csv"),
}
TEXT = "".join(f"{n} times {n} is {n * n}; the remainder of {n} by 7 is {n % 7}.\n\n" for n in NUMBERS)
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
# The sizes of a folder's network, by the names that its config class may have.
SIZES: Mapping[str, int] = {
    **{"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"head_dim": 8, "max_position_embeddings": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "decoder_start_token_id": 0},
}


class Supplies:
    """A folder with all of it. Afterwards only candidates for `check` are written there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, row in ROWS.items():
            _write_rows(folder / name, [row(n) for n in NUMBERS])
        (folder / "text.txt").write_text(TEXT)
        (folder / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
        (folder / "folder").mkdir()
        (folder / "folder" / "a.txt").write_text(TEXT)
        (folder / "folder" / "b.md").write_text(TEXT[: len(TEXT) // 2])
        for side in ("source", "target"):
            lines = [str(ROWS["translations"](n)[side]) for n in NUMBERS]
            (folder / {"source": "lines.en", "target": "lines.de"}[side]).write_text("\n".join(lines))
        self.pretrained = {family: _pretrained(family, folder / family) for family in FAMILIES}

    def sources(self, task: str) -> list[dict[str, Any]]:
        """Return each source that the task can learn from."""
        found = [{"path": str(self.folder / name)} for name in FILES[task]]
        for source in found:
            if source["path"].endswith(".en"):
                source["target_path"] = source["path"].removesuffix("en") + "de"
        return found


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as .jsonl, and as .csv if no field is a list."""
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if any(isinstance(value, list) for value in rows[0].values()):
        return
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.with_suffix(".csv").write_text(table.getvalue())


def _pretrained(family: str, folder: Path) -> Path:
    """Return a folder of the family with weights drawn at random and a tokenizer of bytes with a
    chat template."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = make_tokenizer("bytes")
    known = transformers.AutoConfig.for_model(family)
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    config = transformers.AutoConfig.for_model(family, vocab_size=tokenizer.vocab_size, **sizes)
    getattr(transformers, FAMILIES[family].architecture)(config).save_pretrained(folder)
    tokenizer.save(folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": CHAT_TEMPLATE}))
    return folder
