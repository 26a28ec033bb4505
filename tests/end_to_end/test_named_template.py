"""A chat template that the recipe names, from a base model without one to the export; and another model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tools.campaign.cases import WAYS, arguments
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.data.tokenizer_loading import make_tokenizer, train_bpe

ONE = WAYS[0]
TURNS = [{"role": "user", "content": "q <|im_end|>"}, {"role": "assistant", "content": "a"}]


def base_folder(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    make_tokenizer("bytes").save(folder)
    return folder


def started(folder: Path, base: Path, name: str, **data: Any) -> Ended:
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "chats.jsonl")}
    recipe = {
        "model": {"from_pretrained": str(base)},
        "data": {"task": "sft", "tokenizer": str(base), "sources": [source], "workers": 1, "seq_len": 64, **data},
        "batch": {"global_sequences": 4, "micro_sequences": 4},
        "train": {"steps": 2},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe))
    return run_ranks(train, arguments(path, folder / name, ONE), world_size=1, log=folder / f"{name}.log")


def test_the_export_talks_by_the_template_that_was_chosen(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    added = ["<|im_start|>", "<|im_end|>"]
    ended = started(tmp_path, base, "run", chat_template="chatml", new_tokens=added)
    assert ended.codes == (0,), ended.said
    assert "data: chat template: chatml (data.chat_template)" in ended.said
    assert "warning: data.tokenizer" not in ended.said, "new tokens leave the model's own where they are"
    export = tmp_path / "run" / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    expected = "<|im_start|>user\nq <|im_end|><|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == expected
    generation = json.loads((export / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])


def test_a_tokenizer_of_another_model_is_said(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    train_bpe(["some words"], 257).save(tmp_path / "other")  # as many symbols, with other numbers
    ended = started(tmp_path, base, "run", tokenizer=str(tmp_path / "other"))
    assert ended.codes == (0,), ended.said
    said = (
        f"data.tokenizer {tmp_path / 'other'} is not that of model.from_pretrained {base}: 257 of its 257 symbols have another"
    )
    assert f"warning: {said} number or none" in ended.said
    assert "data: chat template: the tokenizer has none: a plain one" in ended.said
