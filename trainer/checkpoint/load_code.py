"""The Python code by which others load an export, for its model card."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.files.paths import as_loaded
from trainer.schema import Recipe
from trainer.tasks import TASKS, Task
from trainer.tuning import bottleneck_format, peft_format

# The class of transformers that loads a model, by the hub's word for what it does.
AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
}
# What a pipeline is asked, by the same word.
QUESTIONS = {
    "text-generation": 'print(model("Once", max_new_tokens=64)[0]["generated_text"])',
    "fill-mask": 'print(model(f"One {model.tokenizer.mask_token} of many.")[0]["sequence"])',
    "text-classification": 'print(model("A text."))',
}
CHAT = """\
question = [{"role": "user", "content": "Who are you?"}]
print(model(question, max_new_tokens=64)[0]["generated_text"][-1]["content"])"""


def kind_of(folder: Path) -> str:
    """Return what an export is: "model", "peft" for an adapter of peft's format, "bottleneck" for
    one of ours; with both a model and an adapter of ours it is "bottleneck"."""
    if (folder / bottleneck_format.CONFIG).exists():
        return "bottleneck"
    return "peft" if (folder / peft_format.CONFIG).exists() else "model"


def load_code(folder: Path, recipe: Recipe, name: str) -> str:
    """Return code that loads the export by its name and, for a whole model, asks it something."""
    task, kind, quoted = TASKS[recipe.data.task], kind_of(folder), json.dumps(name)
    if kind != "model":
        return _adapter(folder, recipe, task, quoted)
    if task.pipeline_tag not in QUESTIONS:  # transformers has no such pipeline any more
        return _translation(quoted)
    asked = CHAT if task.answers else QUESTIONS[task.pipeline_tag]
    return f'from transformers import pipeline\n\nmodel = pipeline("{task.pipeline_tag}", model={quoted})\n{asked}'


def _translation(name: str) -> str:
    return f"""\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForSeq2SeqLM.from_pretrained({name})
tokens = model.generate(**tokenizer("A text.", return_tensors="pt"), num_beams=4, max_new_tokens=64)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""


def _adapter(folder: Path, recipe: Recipe, task: Task, name: str) -> str:
    auto = AUTO_CLASSES[task.pipeline_tag]
    whole = (folder / "config.json").exists()  # the model lies beside the adapter
    base = name if whole else json.dumps(as_loaded(recipe.model.from_pretrained))
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({name})", f"model = {auto}.from_pretrained({base})"]
    if kind_of(folder) == "bottleneck":
        loader = "from trainer.tuning.bottleneck_format import load_bottlenecks"
        return "\n".join([lines[0], "", loader, *lines[1:], f"model = load_bottlenecks(model, {name})"])
    if recipe.data.new_tokens:
        lines.append("model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))")
    return "\n".join(["from peft import PeftModel", *lines, f"model = PeftModel.from_pretrained(model, {name})"])
