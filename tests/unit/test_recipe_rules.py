"""Combinations that cannot work: each refused, with its legal neighbours, and each neighbour accepted."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import recipe
from trainer.errors import RecipeError

GPT2 = {"family": "gpt2"}
LLAMA = {
    "family": "llama",
    "config": {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48, "intermediate_size": 96},
}
CHATS = {"task": "sft", "sources": [{"path": "corpus.txt"}]}
PAIRS = {"task": "preference", "sources": [{"path": "corpus.txt"}]}
TRANSLATIONS = {"task": "translate", "sources": [{"path": "corpus.txt", "target_path": "corpus.txt"}]}
BLOOM = {"family": "auto", "config": {"model_type": "bloom", "hidden_size": 64}}
PINNED = "0123456789abcdef0123456789abcdef01234567"
PRETRAINED = {"model_type": "llama", "vocab_size": 300, "hidden_size": 8, "num_attention_heads": 2, "torch_dtype": "float16"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a pretrained model in `hf` and one of a family that is not supported in `other`."""
    monkeypatch.chdir(tmp_path)
    bloom = {"model_type": "bloom", "vocab_size": 300}
    folders = {
        "hf": PRETRAINED,
        "other": bloom,
        "bert": {"model_type": "bert"},
        "small": {**bloom, "vocab_size": 256},
        "short": {**bloom, "max_position_embeddings": 16},
        "code": {**bloom, "auto_map": {"AutoConfig": "c.Config"}},
        "elsewhere": {**bloom, "auto_map": {"AutoConfig": "owner/name--c.Config"}},
        "quantized": {**bloom, "quantization_config": {"bits": 4}},
        "nameless": {"vocab_size": 300},
    }
    for name, config in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "corpus.txt").write_text("text")
    return tmp_path


def load(value: dict[str, Any]) -> recipe.ResolvedRecipe:
    Path("r.json").write_text(json.dumps({"model": GPT2, **value}))
    return recipe.load("r.json")


def offload(device: str, **more: Any) -> dict[str, Any]:
    return {"device": device, **({"nvme_path": "nvme"} if device == "nvme" else {}), **more}


def zero(stage: int, *, states: dict[str, Any] | None = None, weights: dict[str, Any] | None = None) -> dict[str, Any]:
    blocks = {"offload_optimizer": states, "offload_param": weights}
    return {"stage": stage, **{name: block for name, block in blocks.items() if block is not None}}


# (name, refused, what the line holds, the neighbours that it names)
RULES: list[tuple[str, dict[str, Any], str, list[dict[str, Any]]]] = [
    ("weights offloaded need stage 3",
     {"zero": zero(2, weights=offload("cpu"))}, "zero.offload_param.device = \"cpu\" needs zero.stage 3",
     [{"zero": zero(3, weights=offload("cpu"))}, {"zero": zero(2, weights=offload("none"))}]),
    ("states on nvme need stage 3",
     {"zero": zero(1, states=offload("nvme"))}, 'zero.offload_optimizer.device = "nvme" needs zero.stage 3, not 1',
     [{"zero": zero(3, states=offload("nvme"))}, {"zero": zero(1, states=offload("cpu"))}, {"zero": zero(1)}]),
    ("states offloaded need stage 1",
     {"zero": zero(0, states=offload("cpu"))}, "legal: zero.stage 1, 2 or 3",
     [{"zero": zero(n, states=offload("cpu"))} for n in (1, 2, 3)]),
    ("nvme needs a path",
     {"zero": zero(3, states={"device": "nvme"})}, "needs zero.offload_optimizer.nvme_path",
     [{"zero": zero(3, states=offload("nvme"))}]),
    ("nvme needs a path for weights too",
     {"zero": zero(3, weights={"device": "nvme"})}, "needs zero.offload_param.nvme_path",
     [{"zero": zero(3, weights=offload("nvme"))}]),
    ("a path needs nvme",
     {"zero": zero(3, states=offload("cpu", nvme_path="nvme"))}, 'is used only with zero.offload_optimizer.device "nvme"',
     [{"zero": zero(3, states=offload("cpu"))}]),
    ("pipelined reads need nvme",
     {"zero": zero(3, states=offload("cpu", pipeline_read=True))}, "pipeline_read is used only with zero.offload",
     [{"zero": zero(3, states=offload("nvme", pipeline_read=True, buffer_count=8))}]),
    *((f"two tiles of states are in memory where {key} is pipelined",
       {"zero": zero(3, states=offload("nvme", **{key: True, "buffer_count": 7}))},
       "zero.offload_optimizer.buffer_count = 7: with pipeline_read or pipeline_write two tiles of 4 buffers each are in",
       [{"zero": zero(3, states=offload("nvme", **{key: True, "buffer_count": 8}))},
        {"zero": zero(3, states=offload("nvme", buffer_count=4))}]) for key in ("pipeline_read", "pipeline_write")),
    ("the tokenizers made here have no bos_token",
     {"data": {"bos": True}}, "data.bos = true, but the tokenizer bytes has no bos_token",
     [{"data": {"bos": False}}, {}]),
    ("family auto does not translate",
     {"model": BLOOM, "data": TRANSLATIONS},
     'family "auto" does not have: name a family that is built here, one of marian, t5',
     [{"model": {"family": "t5"}, "data": TRANSLATIONS}]),
    ("a pair needs room for a token and what begins or ends it",
     {"model": {"family": "t5"}, "data": {**TRANSLATIONS, "seq_len": 2}}, "data.seq_len = 2 has no room for a source",
     [{"model": {"family": "t5"}, "data": {**TRANSLATIONS, "seq_len": 3}}]),
    ("a translation is no continuation",
     {"model": {"family": "t5"}, "data": TRANSLATIONS, "train": {"sample_prompt": "a"}},
     'train.sample_prompt = "a" does not go with data.task "translate": one text is continued, and it has two',
     [{"model": {"family": "t5"}, "data": TRANSLATIONS}]),
    ("the nvme folder's parent exists",
     {"zero": zero(3, states=offload("nvme", nvme_path="none/nvme"))}, "its parent folder does not exist",
     [{"zero": zero(3, states=offload("nvme", nvme_path="hf/nvme"))}]),
    ("adafactor is not flattened",
     {"optimizer": {"name": "adafactor"}, "zero": {"stage": 1}}, "legal: zero.stage 0, or optimizer.name adamw",
     [{"optimizer": {"name": "adafactor"}, "zero": {"stage": 0}}, {"optimizer": {"name": "lion"}, "zero": {"stage": 1}}]),
    *((f"{name} has not Adam's states",
       {"optimizer": {"name": name}, "zero": zero(3, states=offload("nvme"))}, f"{name} cannot be offloaded to \"nvme\"",
       [{"optimizer": {"name": "adam"}, "zero": zero(3, states=offload("nvme"))},
        {"optimizer": {"name": name}, "zero": zero(3, states=offload("cpu"))}]) for name in ("lion", "sgd")),
    *((f"{axis} parallelism is to come",
       {"parallel": {axis: 2}}, f"parallel.{axis} = 2: this version has tensor, pipeline and data parallelism; legal: 1",
       [{"parallel": {axis: 1}}]) for axis in ("context",)),
    ("adafactor sees whole weights",
     {"parallel": {"tensor": 2}, "optimizer": {"name": "adafactor"}}, "not the same training; legal: parallel.tensor 1, or",
     [{"parallel": {"tensor": 2}}, {"optimizer": {"name": "adafactor"}}]),
    ("heads divide over the tensor ranks",
     {"parallel": {"tensor": 5}, "data": {"seq_len": 30}},
     "parallel.tensor = 5 does not divide n_head = 12 and n_inner = 3072 of the network; legal: 1, 2, 3, 4, 6, 12",
     [{"parallel": {"tensor": 4}}]),
    ("key/value heads divide over the tensor ranks, or the other way round",
     {"parallel": {"tensor": 4}, "model": LLAMA},
     "parallel.tensor = 4 does not divide num_key_value_heads = 6 of the network; legal: 1, 2, 3, 6, 12",
     [{"parallel": {"tensor": 12}, "model": LLAMA, "data": {"seq_len": 36}}]),
    ("tokens divide over the tensor ranks",
     {"parallel": {"tensor": 2}, "data": {"seq_len": 31}}, "parallel.tensor = 2 does not divide the 31 tokens of a micro-batch",
     [{"parallel": {"tensor": 2}, "data": {"seq_len": 32}},
      {"parallel": {"tensor": 2, "sequence_parallel": False}, "data": {"seq_len": 31}},
      {"parallel": {"tensor": 2}, "data": {"seq_len": 31}, "batch": {"micro_sequences": 2}}]),
    *((f"{key} needs tensor ranks", {"parallel": {key: True}}, f"parallel.{key} is used only with parallel.tensor above 1",
       [{"parallel": {key: True, "tensor": 2}}, {"parallel": {key: False}}]) for key in ("sequence_parallel", "overlap")),
    ("loss scale is for fp16",
     {"precision": {"dtype": "bf16", "loss_scale": {"window": 5}}}, 'precision.loss_scale.window is used only with',
     [{"precision": {"dtype": "fp16", "loss_scale": {"window": 5}}}, {"precision": {"dtype": "bf16"}}]),
    ("one kind of loss scale",
     {"precision": {"dtype": "fp16", "loss_scale": {"static": 8, "window": 5}}}, "is for dynamic scaling",
     [{"precision": {"dtype": "fp16", "loss_scale": {"static": 8}}}]),
    ("warm-up within the run",
     {"schedule": {"warmup_steps": 9}, "train": {"steps": 8}}, "legal: 0 to 8",
     [{"schedule": {"warmup_steps": 8}, "train": {"steps": 8}}]),
    ("decay within the run",
     {"schedule": {"name": "wsd", "warmup_steps": 4, "decay_steps": 5}, "train": {"steps": 8}}, "legal decay_steps: 0 to 4",
     [{"schedule": {"name": "wsd", "warmup_steps": 4, "decay_steps": 4}, "train": {"steps": 8}}]),
    ("decay is for wsd",
     {"schedule": {"decay_steps": 5}}, 'schedule.decay_steps is used only with schedule.name "wsd", not "cosine": remove it',
     [{"schedule": {"name": "wsd", "decay_steps": 5}}]),
    ("a floor is for falling schedules",
     {"schedule": {"name": "constant", "min_lr_ratio": 0.5}}, '"cosine" or "wsd", not "constant": remove it',
     [{"schedule": {"name": "constant"}}, {"schedule": {"name": "linear", "min_lr_ratio": 0.5}}]),
    ("betas are Adam's and Lion's",
     {"optimizer": {"name": "sgd", "betas": [0.9, 0.9]}}, 'betas is used only with optimizer.name "adamw", "adam" or',
     [{"optimizer": {"name": n, "betas": [0.9, 0.9]}} for n in ("adamw", "adam", "lion")]),
    ("eps is Adam's",
     {"optimizer": {"name": "lion", "eps": 1e-6}}, 'optimizer.eps is used only with optimizer.name "adamw" or "adam", not',
     [{"optimizer": {"name": "adam", "eps": 1e-6}}]),
    ("momentum is SGD's",
     {"optimizer": {"momentum": 0.9}}, 'optimizer.momentum is used only with optimizer.name "sgd", not "adamw"',
     [{"optimizer": {"name": "sgd", "momentum": 0.9}}]),
    ("a model is needed",
     {"model": {}}, "no model: give model.family (gpt2, llama, mistral",
     [{"model": GPT2}, {"model": {"from_pretrained": "hf"}}, {"model": {"from_pretrained": "openai-community/gpt2"}}]),
    ("a family is one of those",
     {"model": {"family": "lama"}}, 'unknown family "lama"; did you mean llama?; legal: gpt2, llama',
     [{"model": {"family": "llama"}}]),
    ("a bidirectional family is not for the next token",
     {"model": {"family": "bert"}}, 'model.family = "bert" sees the next token, which data.task pretrain predicts: it is for '
     "data.task mlm and classify; legal families for pretrain: gpt2, llama, mistral, qwen2, qwen3, phi3, gemma2",
     [{"model": {"family": "gpt2"}, "data": {"task": "pretrain"}}]),
    ("conversations have no text field",
     {"data": {"task": "sft", "sources": [{"path": "corpus.txt", "field": "t"}]}},
     'data.task "pretrain" or "mlm", not "sft": remove it; what rows call their fields is said in '
     "fields",
     [{"data": {"sources": [{"path": "corpus.txt", "field": "t"}]}}, {"data": CHATS}]),
    *((f"texts have no {key}",
       {"data": {"eval_sources": [{"path": "corpus.txt", key: value}]}},
       f"data.eval_sources[0].{key}",
       [{"data": {**CHATS, "eval_sources": [{"path": "corpus.txt", key: value}]}},
        {"data": {"eval_sources": [{"path": "corpus.txt"}]}}])
      for key, value in {"shape": "alpaca", "fields": {"prompt": "q"}}.items()),
    ("texts are learned whole",
     {"data": {"learn": "all"}}, 'data.learn is used only with data.task "sft", not "pretrain": remove it',
     [{"data": {**CHATS, "learn": "all"}}, {}]),
    ("source code holds no conversations",
     {"data": {"task": "sft"}}, 'data.sources is "stdlib", source code, which holds no conversations',
     [{"data": CHATS}]),
    ("fields are of one shape",
     {"data": {"task": "sft", "sources": [{"path": "corpus.txt", "fields": {"prompt": "q", "output": "a"}}]}},
     'data.sources[0].fields names ["output", "prompt"], not of one shape; legal: messages, system, tools (messages); conv',
     [{"data": {"task": "sft", "sources": [{"path": "corpus.txt", "fields": {"prompt": "q", "completion": "a"}}]}}]),
    ("fields are spelt as they are, and nothing is said of a source that was not read",
     {"data": {"task": "sft", "sources": [{"path": "corpus.txt", "fields": {"promt": "q"}}]}},
     "unknown key data.sources[0].fields.promt; did you mean data.sources[0].fields.prompt?",
     [{"data": {"task": "sft", "sources": [{"path": "corpus.txt", "fields": {"prompt": "q"}}]}}]),
    ("fields are of the shape that is named",
     {"data": {"task": "sft", "sources": [{"path": "corpus.txt", "shape": "alpaca", "fields": {"prompt": "q"}}]}},
     'names ["prompt"], not of one shape; legal: instruction, input, output, history, system, tools (alpaca)',
     [{"data": {"task": "sft", "sources": [{"path": "corpus.txt", "shape": "alpaca", "fields": {"output": "a"}}]}}]),
    ("pairs have no shape",
     {"data": {**PAIRS, "sources": [{"path": "corpus.txt", "shape": "alpaca"}]}},
     'data.sources[0].shape is used only with data.task "sft", not "preference": remove it',
     [{"data": PAIRS}]),
    ("fields of pairs",
     {"data": {**PAIRS, "sources": [{"path": "corpus.txt", "fields": {"chosen": "a", "completion": "b"}}]}},
     'fields.completion is used only with data.task "sft", not "preference": remove it',
     [{"data": {**PAIRS, "sources": [{"path": "corpus.txt", "fields": {"chosen": "a", "rejected": "b"}}]}}]),
    ("source code holds no pairs",
     {"data": {"task": "preference"}}, "source code, which holds no pairs", [{"data": PAIRS}]),
    ("answers do not see each other",
     {"data": {**PAIRS, "isolate_documents": False}}, 'does not go with data.task "preference": the', [{"data": PAIRS}]),
    ("keys of preferences need the task",
     {"preference": {"beta": 0.2}}, 'preference.beta is used only with data.task "preference", not "pretrain": remove it',
     [{"data": PAIRS, "preference": {"beta": 0.2}}, {}]),
    ("only dpo smooths labels",
     {"data": PAIRS, "preference": {"loss": "orpo", "label_smoothing": 0.1}},
     'label_smoothing is used only with preference.loss "dpo", not "orpo": remove it',
     [{"data": PAIRS, "preference": {"label_smoothing": 0.1}}, {"data": PAIRS, "preference": {"loss": "orpo"}}]),
    ("pairs have no labels of tokens",
     {"data": PAIRS, "train": {"label_smoothing": 0.1}}, 'with data.task "preference": labels of tokens',
     [{"data": PAIRS, "preference": {"label_smoothing": 0.1}}, {"train": {"label_smoothing": 0.1}}]),
    ("preferences are for our own families",
     {"model": BLOOM, "data": PAIRS}, 'data.task "preference" needs an output layer that sums over each answer',
     [{"data": PAIRS}, {"model": BLOOM, "data": CHATS}]),
    ("a bidirectional family learns no answers",
     {"model": {"family": "bert"}, "data": CHATS}, "sees the next token, which data.task sft predicts",
     [{"model": {"family": "gpt2"}, "data": CHATS}]),
    ("a bidirectional folder is not for the next token",
     {"model": {"from_pretrained": "bert"}}, 'model.family = "bert" sees the next token',
     [{"model": {"from_pretrained": "hf"}}]),
    ("a revision is of the hub",
     {"model": {"from_pretrained": "hf", "revision": "abc"}}, "hf is a folder here: remove it",
     [{"model": {"from_pretrained": "openai-community/gpt2", "revision": "abc"}}, {"model": {"from_pretrained": "hf"}}]),
    ("a revision is of something",
     {"model": {"family": "gpt2", "revision": "abc"}}, "model.revision needs model.from_pretrained",
     [{"model": {"from_pretrained": "openai-community/gpt2", "revision": "abc"}}]),
    ("pretrained shapes are fixed",
     {"model": {"from_pretrained": "hf", "config": {"hidden_size": 16}}}, "legal here: attention_dropout",
     [{"model": {"from_pretrained": "hf", "config": {"attention_dropout": 0.1}}}]),
    ("a pretrained family is its own",
     {"model": {"from_pretrained": "hf", "family": "gpt2"}}, "holds a llama: remove model.family",
     [{"model": {"from_pretrained": "hf", "family": "llama"}}]),
    ("a pretrained family is supported",
     {"model": {"from_pretrained": "other"}}, 'model_type = "bloom" is not a supported family',
     [{"model": {"from_pretrained": "hf"}}, {"model": {"from_pretrained": "other", "family": "auto"}}]),
    *((f"family auto is not divided: {axis}",
       {"model": BLOOM, "parallel": {axis: 2}}, f'parallel.{axis} = 2: a model of family "auto"',
       [{"model": BLOOM, "parallel": {axis: 1}}, {"model": GPT2, "parallel": {"tensor": 2}}])
      for axis in ("tensor", "pipeline")),
    ("selective recompute is our attention's",
     {"model": BLOOM, "train": {"recompute": "selective"}}, 'legal: "none", "full"',
     [{"model": BLOOM, "train": {"recompute": "full"}}]),
    ("family auto needs a model type",
     {"model": {"family": "auto", "config": {"hidden_size": 64}}}, "or model.config with model_type",
     [{"model": BLOOM}, {"model": {"family": "auto", "from_pretrained": "other"}}]),
    ("family auto may be one of ours",
     {"model": {"family": "gpt2", "from_pretrained": "hf"}}, "holds a llama",
     [{"model": {"family": "auto", "from_pretrained": "hf"}}]),
    ("formats have one owner in family auto too",
     {"model": {"family": "auto", "config": {"model_type": "bloom", "torch_dtype": "bfloat16"}}}, "write precision.dtype",
     [{"model": BLOOM, "precision": {"dtype": "bf16"}}]),
    ("a folder's shapes are fixed in family auto too",
     {"model": {"family": "auto", "from_pretrained": "other", "config": {"n_head": 2}}}, "legal here: rates of dropout",
     [{"model": {"family": "auto", "from_pretrained": "other", "config": {"hidden_dropout": 0.1}}}]),
    ("a folder's vocabulary holds the tokenizer's",
     {"model": {"family": "auto", "from_pretrained": "small"}}, "vocab_size = 256 is less than the tokenizer's 257 symbols",
     [{"model": {"family": "auto", "from_pretrained": "other"}}]),
    ("a folder's positions cover the sequence",
     {"model": {"family": "auto", "from_pretrained": "short"}}, "max_position_embeddings = 16 is less than data.seq_len = 512",
     [{"model": {"family": "auto", "from_pretrained": "short"}, "data": {"seq_len": 16}}]),
    ("quantized weights are not trained",
     {"model": {"family": "auto", "from_pretrained": "quantized"}}, "quantized weights cannot be trained",
     [{"model": {"family": "auto", "from_pretrained": "other"}}]),
    ("a folder says what it is",
     {"model": {"family": "auto", "from_pretrained": "nameless"}}, "model_type = null",
     [{"model": {"family": "auto", "from_pretrained": "other"}}]),
    ("a folder's code is not run unasked",
     {"model": {"family": "auto", "from_pretrained": "code"}}, "legal: model.trust_remote_code true after reading it",
     [{"model": {"family": "auto", "from_pretrained": "code", "trust_remote_code": True}}]),
    ("no code from elsewhere",
     {"model": {"family": "auto", "from_pretrained": "elsewhere", "trust_remote_code": True}}, "another repository",
     [{"model": {"family": "auto", "from_pretrained": "code", "trust_remote_code": True}}]),
    ("trust needs code",
     {"model": {"family": "auto", "from_pretrained": "other", "trust_remote_code": True}}, "there is no code to trust",
     [{"model": {"family": "auto", "from_pretrained": "other"}}]),
    ("trust is family auto's",
     {"model": {"family": "gpt2", "trust_remote_code": True}}, 'used only with model.family "auto", not "gpt2": remove it',
     [{"model": GPT2}]),
    ("trust needs a folder",
     {"model": {**BLOOM, "trust_remote_code": True}}, "model.trust_remote_code needs model.from_pretrained",
     [{"model": BLOOM}]),
    *((f"trusted code of the hub is pinned, not {revision}",
       {"model": {"family": "auto", "from_pretrained": "owner/name", "trust_remote_code": True, **revision}},
       "model.revision must pin it to a commit of 40 hex digits",
       [{"model": {"family": "auto", "from_pretrained": "owner/name", "trust_remote_code": True, "revision": PINNED}},
        {"model": {"family": "auto", "from_pretrained": "owner/name", **revision}}])
      for revision in ({}, {"revision": "main"}, {"revision": PINNED[:7]}, {"revision": PINNED.upper()})),
    ("a pretrained folder has a config",
     {"model": {"from_pretrained": "empty"}}, "empty/config.json: No such file",
     [{"model": {"from_pretrained": "hf"}}]),
    ("a local model exists",
     {"model": {"from_pretrained": "./nothing"}}, 'model.from_pretrained = "./nothing" does not exist',
     [{"model": {"from_pretrained": "./hf"}}]),
    ("formats have one owner",
     {"model": {"family": "gpt2", "config": {"dtype": "bfloat16"}}}, "model.config.dtype: number formats have one owner",
     [{"precision": {"dtype": "bf16"}}]),
    ("heads divide the hidden size",
     {"model": {"family": "gpt2", "config": {"n_head": 7}}}, "nearest legal n_head: 6 or 8",
     [{"model": {"family": "gpt2", "config": {"n_head": n}}} for n in (6, 8)]),
    ("positions cover the sequence",
     {"data": {"seq_len": 2000}}, "model.config.n_positions = 1024 is less than data.seq_len = 2000",
     [{"data": {"seq_len": 1024}}, {"data": {"seq_len": 2000}, "model": {"family": "gpt2", "config": {"n_positions": 2000}}}]),
    ("the vocabulary holds the tokenizer's",
     {"model": {"family": "gpt2", "config": {"vocab_size": 256}}}, "less than the tokenizer's 257 symbols; legal: 257 or more",
     [{"model": {"family": "gpt2", "config": {"vocab_size": 257}}}]),
    ("evaluation needs data",
     {"train": {"eval_every": 5}, "data": {"eval_fraction": 0.0}}, "needs held-out documents",
     [{"train": {"eval_every": 5}}, {"train": {"eval_every": 0}, "data": {"eval_fraction": 0.0}},
      {"train": {"eval_every": 5}, "data": {"eval_fraction": 0.0, "eval_sources": [{"path": "corpus.txt"}]}}]),
    ("one kind of held-out data",
     {"data": {"eval_fraction": 0.1, "eval_sources": [{"path": "corpus.txt"}]}}, "remove one of them",
     [{"data": {"eval_sources": [{"path": "corpus.txt"}]}}, {"data": {"eval_fraction": 0.1}}]),
    ("local data exists",
     {"data": {"sources": [{"path": "corpos.txt"}]}}, 'data.sources[0].path = "corpos.txt" does not exist (looked from',
     [{"data": {"sources": [{"path": "corpus.txt"}]}}, {"data": {"sources": [{"path": "owner/hub-name"}]}}]),
    ("stdlib is spelt so",
     {"data": {"sources": [{"path": "stdlb"}]}}, 'did you mean "stdlib"?',
     [{"data": {"sources": [{"path": "stdlib"}]}}]),
    ("files are left out of a folder",
     {"data": {"sources": [{"path": "corpus.txt", "exclude": ["*.md"]}]}},
     'data.sources[0].exclude leaves out files of a folder, and "corpus.txt" is none: remove it',
     [{"data": {"sources": [{"path": "hf", "exclude": ["*.md"]}]}},
      {"data": {"sources": [{"path": "stdlib", "exclude": ["encodings/*"]}]}}]),
    ("a local tokenizer exists",
     {"data": {"tokenizer": "./tok"}}, 'data.tokenizer = "./tok" does not exist',
     [{"data": {"tokenizer": "./hf"}}, {"data": {"tokenizer": "owner/hub-name"}}]),
    ("a BPE holds the bytes",
     {"data": {"tokenizer": "bpe:256"}}, "legal: bpe:257",
     [{"data": {"tokenizer": "bpe:257"}}]),
    ("an adapter is of no projection of its own",
     {"tuning": {"method": "adapter", "targets": ["mlp", "o"]}}, 'behind a whole attention or mlp, not beside "o"; legal: att',
     [{"tuning": {"method": "adapter", "targets": ["mlp"]}}, {"tuning": {"method": "adapter", "targets": ["attention"]}}]),
    ("no weight takes up an adapter",
     {"tuning": {"method": "adapter", "merge": True}}, 'tuning.merge is used only with tuning.method',
     [{"tuning": {"method": "adapter"}}, {"tuning": {"method": "dora", "merge": True}}]),
    ("blocks of quantized weights are not cut",
     {"tuning": {"method": "lora", "quantize": "nf4"}, "model": {**LLAMA, "config": {**LLAMA["config"], "hidden_size": 96}}},
     "64 inputs are quantized together, and attention and MLP has 96 of them",
     [{"tuning": {"method": "lora"}, "model": {**LLAMA, "config": {**LLAMA["config"], "hidden_size": 96}}}]),
    ("bitfit has no frozen weights of its own to quantize",
     {"tuning": {"method": "bitfit", "quantize": "nf4"}}, '"ia3" or "adapter", not "bitfit": remove it',
     [{"tuning": {"method": "lora", "quantize": "int8"}}]),
    ("there must be ranks to share out",
     {"tuning": {"method": "adalora", "rank": 4, "budget": {"target_rank": 4}}}, "leaves nothing to share out of tuning.rank",
     [{"tuning": {"method": "adalora", "rank": 5, "budget": {"target_rank": 4}}},
      {"tuning": {"method": "adalora", "rank": 4, "budget": {"target_rank": 3}}}]),
    ("and steps to do it in",
     {"tuning": {"method": "adalora", "budget": {"warmup_steps": 90, "final_steps": 10}}}, "90 + final_steps 10 = 100 of",
     [{"tuning": {"method": "adalora", "budget": {"warmup_steps": 90, "final_steps": 9}}}]),
    ("others have no budget",
     {"tuning": {"method": "lora", "budget": {"every": 2}}}, 'every is used only with tuning.method "adalora", not "lora"',
     [{"tuning": {"method": "adalora", "budget": {"every": 2}}}]),
    ("only adapters have a bottleneck",
     {"tuning": {"method": "lora", "bottleneck": 8}}, 'bottleneck is used only with tuning.method "adapter", not "lora"',
     [{"tuning": {"method": "adapter", "bottleneck": 8}}, {"tuning": {"method": "lora", "rank": 8}}]),
    ("tuning's keys need a method",
     {"tuning": {"rank": 4}}, "tuning.rank is used only with tuning.method",
     [{"tuning": {"method": "lora", "rank": 4}}]),
    ("bitfit has no rank",
     {"tuning": {"method": "bitfit", "rank": 4}}, '"dora" or "adalora", not "bitfit": remove it',
     [{"tuning": {"method": "bitfit"}}, {"tuning": {"method": "dora", "rank": 4}}]),
    ("dora drops nothing",
     {"tuning": {"method": "dora", "dropout": 0.1}}, '"lora" or "adalora", not "dora": remove it',
     [{"tuning": {"method": "lora", "dropout": 0.1}}]),
    ("bitfit needs biases",
     {"tuning": {"method": "bitfit"}, "model": LLAMA}, "trains biases, and this llama has none; legal: lora, dora, adalora",
     [{"tuning": {"method": "ia3"}, "model": LLAMA}]),
    ("k and v of GPT-2 are not rescaled without q",
     {"tuning": {"method": "ia3"}}, "legal: all of q, k, v, or none",
     [{"tuning": {"method": "ia3", "targets": ["q", "k", "v", "down"]}}]),
    ("family auto is not adapted",
     {"tuning": {"method": "lora"}, "model": BLOOM}, 'which family "auto" does not have',
     [{"tuning": {"method": "lora"}}, {"model": BLOOM}]),
    ("frozen weights are not swapped",
     {"tuning": {"method": "lora"}, "zero": zero(3, weights=offload("nvme"))}, "DeepSpeed 0.19 runs out of swap buffers",
     [{"tuning": {"method": "lora"}, "zero": zero(3, weights=offload("cpu"), states=offload("nvme"))},
      {"zero": zero(3, weights=offload("nvme"))}]),
    ("GPT-2 has no gate",
     {"tuning": {"method": "lora", "targets": ["gate"]}}, 'family gpt2 has no projection "gate"; legal: attention, mlp, q, k',
     [{"tuning": {"method": "lora", "targets": ["up"]}}, {"tuning": {"method": "lora", "targets": ["mlp"]}}]),
    ("GPT-2 holds q, k and v in one module",
     {"tuning": {"method": "lora", "targets": ["q", "v", "o"]}}, "not one for q, v alone; legal: all of q, k, v, or none",
     [{"tuning": {"method": "lora", "targets": ["q", "k", "v"]}},
      {"tuning": {"method": "lora", "targets": ["q", "v"]}, "model": LLAMA}]),
    ("a BPE has a size",
     {"data": {"tokenizer": "bpe:4k"}}, "legal: bpe:257",
     [{"data": {"tokenizer": "bpe:4096"}}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "refused", "said", "neighbours"), RULES, ids=[rule[0] for rule in RULES])
def test_rule(name: str, refused: dict[str, Any], said: str, neighbours: list[dict[str, Any]]) -> None:
    with pytest.raises(RecipeError) as error:
        load(refused)
    assert len(error.value.lines) == 1, error.value.lines
    assert said in error.value.lines[0]
    for neighbour in neighbours:
        load(neighbour)


def test_a_pretrained_folder_gives_family_and_network() -> None:
    resolved = load({"model": {"from_pretrained": "hf", "config": {"attention_dropout": 0.5}}})
    assert resolved.recipe.model.family == "llama"
    assert resolved.origins["model.family"] == "derived"
    network = resolved.network(vocab_size=257)
    assert (network.hidden_size, network.vocab_size, network.attention_dropout) == (8, 300, 0.5)


def test_a_hub_name_gives_its_network_once_fetched() -> None:
    resolved = load({"model": {"from_pretrained": "owner/name"}})
    with pytest.raises(RecipeError, match="hub name"):
        resolved.network(vocab_size=257)
    with pytest.raises(RecipeError, match=r"it is for data\.task mlm and classify"):
        resolved.network(vocab_size=257, pretrained={"model_type": "bert"})
    assert resolved.network(vocab_size=257, pretrained=PRETRAINED).hidden_size == 8


def test_a_pretrained_config_that_cannot_be_translated_is_said_at_the_door() -> None:
    Path("hf/config.json").write_text(json.dumps({**PRETRAINED, "rope_scaling": {"rope_type": "yarn"}, "hidden_act": "tanh"}))
    with pytest.raises(RecipeError) as error:
        load({"model": {"from_pretrained": "hf"}})
    assert len(error.value.lines) == 2
    assert all("hf/config.json: " in line for line in error.value.lines)


def test_a_config_of_others_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """With Infinity, and more values than a recipe may have; the recipe's own JSON stays strict."""
    labels = {str(number): f"label {number}" for number in range(30_000)}
    config = {**PRETRAINED, "id2label": labels, "label2id": {name: int(number) for number, name in labels.items()}}
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "config.json").write_text(json.dumps(config))
    found = load({"model": {"from_pretrained": str(tmp_path / "many")}})
    assert found.hf_config is not None
    assert len(found.hf_config["id2label"]) == 30_000
    (tmp_path / "mamba").mkdir()
    mamba = {"model_type": "mamba2", "vocab_size": 300, "time_step_limit": [0.0, float("inf")]}
    (tmp_path / "mamba" / "config.json").write_text(json.dumps(mamba))
    assert "Infinity" in (tmp_path / "mamba" / "config.json").read_text()
    found = load({"model": {"family": "auto", "from_pretrained": str(tmp_path / "mamba")}})
    assert found.hf_config is not None
    assert found.hf_config["time_step_limit"] == [0.0, float("inf")]
    (tmp_path / "mamba" / "config.json").write_text("[Infinity]")
    with pytest.raises(RecipeError, match=r"config.json: not a JSON object"):
        load({"model": {"family": "auto", "from_pretrained": str(tmp_path / "mamba")}})
    with pytest.raises(RecipeError, match="Infinity is not a JSON number"):
        load({"model": {"family": "auto", "config": mamba}})


def test_a_recipe_may_have_a_thousand_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = {"path": str(tmp_path / "a.txt"), "weight": 1.0, "field": "text", "split": "train", "columns": ["text"]}
    found = load({"model": {"family": "gpt2"}, "data": {"sources": [source] * 1000}})
    assert len(found.recipe.data.sources) == 1000
