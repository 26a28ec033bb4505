"""Small models with a chat template, for tests that talk with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken

from tools.campaign.cases import WAYS, arguments
from tools.campaign.ranks import run_ranks, train
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import make_tokenizer

END = "<|end|>"
# Ends turns with a token that is not the end of a document.
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ONE = WAYS[0]


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """A byte-level tokenizer of a Hugging Face folder with a chat template of its own."""
    backend = make_tokenizer("bytes")._backend
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    Tokenizer(backend, end_of_document="<|endoftext|>", config={"chat_template": template}).save(folder)
    return folder


def chat_model(folder: Path, *, template: str = TEMPLATE, positions: int = 256, **config: Any) -> Path:
    """A folder with an untrained Llama whose answers depend on what was said before."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = transformers.LlamaConfig(
        **{"vocab_size": 258, "intermediate_size": 48, "max_position_embeddings": positions, "initializer_range": 0.4},
        **{"bos_token_id": None, "eos_token_id": 257, **sizes, **config},
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return with_template(folder, template)


def tuned_run(base: Path, run_dir: Path) -> Path:
    """A run of two steps that taught the model of `base` by LoRA; `export` in it is an adapter."""
    rows = [{"prompt": f"double {i}", "completion": str(2 * i)} for i in range(40)]
    source = run_dir.with_name("chats.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"from_pretrained": str(base)},
        "data": {
            **{"task": "sft", "sources": [{"path": str(source)}], "tokenizer": str(base), "seq_len": 48, "workers": 1},
            "cache_dir": str(run_dir.with_name("data")),
        },
        "batch": {"global_sequences": 4, "micro_sequences": 4},
        "tuning": {"method": "lora", "rank": 4},
        "optimizer": {"lr": 0.03},
        "train": {"steps": 2},
    }
    path = run_dir.with_name("recipe.json")
    path.write_text(json.dumps(recipe))
    ended = run_ranks(train, arguments(path, run_dir, ONE), world_size=1, log=run_dir.with_name("log"))
    assert ended.codes == (0,), ended.said
    return run_dir
