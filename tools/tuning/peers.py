"""The other side: trl's SFTTrainer and DPOTrainer, with peft where an adapter is trained, and
transformers' Seq2SeqTrainer, each in its own loop.

    python -m tuning.peers JOB READS WRITES

`JOB` is a JSON file: `peer`, a name in `PEERS`; `folder`, that of the work; `dtype`. `READS` and
`WRITES`: see `turns.Turn`. The data are our rows, already tokenized and packed, step by step; the
trainers collate them in their own ways. bf16 is autocast over fp32 weights, as these trainers do
it, except for weights that an adapter leaves as they are: those are held in bf16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from tuning.turns import Turn

# Of a row: tokens, and what each is as a target, or -100.
Documents = list[tuple[list[int], list[int]]]
Steps = list[list[Documents]]
IGNORE = -100


@dataclass(frozen=True)
class Job:
    """The input of a peer: the rows of each step, the model, and the recipe's settings."""

    folder: Path
    dtype: str
    steps: Steps
    keys: dict[str, Any]  # of the recipe

    @classmethod
    def read(cls, folder: Path, dtype: str) -> Job:
        steps, keys = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("rows.json", "recipe.json"))
        return cls(folder, dtype, steps, keys)

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Return the arguments that all trainers take, from the recipe."""
        optimizer, train = self.keys["optimizer"], self.keys["train"]
        return {
            "output_dir": str(self.folder / "theirs"),
            "max_steps": len(self.steps),
            "learning_rate": optimizer["lr"],
            "lr_scheduler_type": "constant",
            "weight_decay": optimizer["weight_decay"],
            "adam_beta1": optimizer["betas"][0],
            "adam_beta2": optimizer["betas"][1],
            "adam_epsilon": optimizer["eps"],
            "max_grad_norm": train["clip_norm"],
            "logging_steps": train["log_every"],
            "bf16": self.dtype == "bf16",
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **more,
        }

    def causal_model(self) -> Any:
        """Return the model in fp32, or with the adapter of the first step beside it."""
        adapter = self.folder / "adapter"
        held = torch.bfloat16 if adapter.exists() and self.dtype == "bf16" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=held, attn_implementation="sdpa")
        if not adapter.exists():
            return model
        import peft

        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)

    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder / "model")


@dataclass
class Batches:
    """Examples in the order in which they are taken, and how many each batch has."""

    examples: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, examples: Iterable[dict[str, Any]]) -> None:
        before = len(self.examples)
        self.examples += examples
        self.sizes.append(len(self.examples) - before)

    def indices(self) -> list[list[int]]:
        remaining = iter(range(len(self.examples)))
        return [[next(remaining) for _ in range(size)] for size in self.sizes]


def in_given_order(trainer: type[Any], batches: Batches) -> type[Any]:
    """Return the trainer's class with batches in the given order, of the given sizes, in place of
    drawn ones. It collates them and does all else as before."""

    class InGivenOrder(trainer):
        def get_train_dataloader(self) -> Any:
            loader = DataLoader(self.train_dataset, batch_sampler=batches.indices(), collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    return InGivenOrder


def packed_row(row: Documents) -> dict[str, Any]:
    """Return a row as trl packs one."""
    lengths = [len(tokens) for tokens, _ in row]
    return {
        "input_ids": [t for ids, _ in row for t in ids],
        "labels": [t for _, ids in row for t in ids],
        "seq_lengths": lengths,
    }


def sft(job: Job, batches: Batches, **more: Any) -> Any:
    import trl

    arguments = trl.SFTConfig(
        **job.arguments(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, shuffle_dataset=False, **more)
    )
    trainer = in_given_order(trl.SFTTrainer, batches)
    return trainer(
        job.causal_model(), arguments, train_dataset=Dataset.from_list(batches.examples), processing_class=job.tokenizer()
    )


def packed_together(job: Job) -> Any:
    """Return trl's own packing: all rows of a micro-batch are flattened into one."""
    batches = Batches()
    for step in job.steps:
        batches.add(packed_row(row) for row in step)
    return sft(job, batches, packing=True)


def packed_one_by_one(job: Job) -> Any:
    """Return the same with a row in each micro-batch, so that attention's mask is a row long."""
    batches = Batches()
    for step in job.steps:
        for row in step:
            batches.add([packed_row(row)])
    return sft(job, batches, packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=len(job.steps[0]))


def padded(job: Job) -> Any:
    """Return the same documents without packing, padded to the longest of the step."""
    batches = Batches()
    for step in job.steps:
        batches.add({"input_ids": tokens, "labels": labels} for row in step for tokens, labels in row)
    return sft(job, batches)


def dpo(job: Job, *, precompute: bool, by_row: bool) -> Any:
    """Return trl's DPOTrainer, with all pairs of a step in a micro-batch, or those of each row in
    one of its own."""
    import trl

    batches = Batches()
    for step in job.steps:
        for rows in [[row] for row in step] if by_row else [step]:
            batches.add(pair for row in rows for pair in pairs_of(row))
    loss = job.keys["preference"]
    arguments = trl.DPOConfig(
        **job.arguments(
            beta=loss["beta"],
            max_length=None,
            precompute_ref_log_probs=precompute,
            per_device_train_batch_size=max(batches.sizes),
            gradient_accumulation_steps=len(job.steps[0]) if by_row else 1,
        )
    )
    trainer = in_given_order(already_tokenized(trl.DPOTrainer), batches)
    return trainer(
        job.causal_model(), None, arguments, train_dataset=Dataset.from_list(batches.examples), processing_class=job.tokenizer()
    )


def already_tokenized(trainer: type[Any]) -> type[Any]:
    """Return the DPOTrainer's class without its tokenizing, for which it has no option."""

    class AlreadyTokenized(trainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return AlreadyTokenized


def pairs_of(row: Documents) -> Iterable[dict[str, list[int]]]:
    """Yield the pairs of a row; the prompt is what both answers follow."""
    for (chosen, labels), (rejected, _) in zip(row[::2], row[1::2], strict=True):
        prompt = next(place for place, label in enumerate(labels) if label != IGNORE)
        assert chosen[:prompt] == rejected[:prompt]
        yield {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}


def translation(job: Job) -> Any:
    batches = Batches()
    for step in job.steps:
        batches.add(pair for row in step for pair in translations_of(row))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        job.folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    # Marian trains the bias of its logits, as we do; transformers keeps it as it is loaded
    bias = torch.nn.Parameter(model._buffers.pop("final_logits_bias"))
    model.register_parameter("final_logits_bias", bias)
    tokenizer = job.tokenizer()
    trainer = in_given_order(transformers.Seq2SeqTrainer, batches)
    return trainer(
        model,
        transformers.Seq2SeqTrainingArguments(**job.arguments()),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=Dataset.from_list(batches.examples),
        processing_class=tokenizer,
    )


def translations_of(row: Documents) -> Iterable[dict[str, list[int]]]:
    """Yield the pairs of a row, which has the sources first. A target begins with the token that
    the model puts there by itself."""
    half = len(row) // 2
    for (source, _), (_, labels) in zip(row[:half], row[half:], strict=True):
        yield {"input_ids": source, "attention_mask": [1] * len(source), "labels": labels[1:]}


PEERS: dict[str, Callable[[Job], Any]] = {
    "trl, rows flattened": packed_together,
    "trl, row by row": packed_one_by_one,
    "trl, padded": padded,
    "trl, all pairs": partial(dpo, precompute=True, by_row=False),
    "trl, pairs by row": partial(dpo, precompute=True, by_row=True),
    "trl, reference in the step": partial(dpo, precompute=False, by_row=True),
    "Seq2SeqTrainer": translation,
}


class InTurn(transformers.TrainerCallback):  # type: ignore[misc]
    """A callback that waits for its turn before the first step and after each step's record."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self._turn.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            control.should_training_stop = not self._turn.wait(loss=logs["loss"], grad_norm=logs["grad_norm"])


def main(arguments: Sequence[str]) -> None:
    keys = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    trainer = PEERS[keys["peer"]](Job.read(Path(keys["folder"]), keys["dtype"]))
    trainer.add_callback(InTurn(Turn.from_arguments()))
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1:])
