"""DeepSpeed as its users run it: under transformers' Trainer, and its PipelineEngine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from contenders import Loop, Turns, step_by_step
from contest import CLIP_NORM, LR, PAIR, SEED, Shape, peers_update
from deepspeed.pipe import PipelineModule
from hugging_face_peer import CPU, FirstWeights, hugging_face_inputs, hugging_face_model, whole_model
from plain_loop import Numbers, Update
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from parallel.documents import Documents
from parallel.params import owned_specs
from trainer.data.loader import MicroBatch
from trainer.engine.execution import DTYPES
from trainer.engine.optimizers import make_optimizer
from trainer.engine.threaded_io import use_threads_where_async_io_is_missing
from trainer.model.transformer import Stage
from trainer.schema import Dtype, Recipe

ENDLESS = 1_000_000  # steps


class SameRows(Dataset[dict[str, Tensor]]):
    """The rows of both ranks' batches, again and again: first those of rank 0, then of rank 1, as
    the Trainer deals batches out."""

    def __init__(self, shape: Shape) -> None:
        inputs = [hugging_face_inputs(shape.batch(SEED + rank, documents=1), CPU) for rank in range(PAIR)]
        self.rows = [{name: t[row] for name, t in of.items()} for of in inputs for row in range(shape.micro_sequences)]

    def __len__(self) -> int:
        return ENDLESS * len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index % len(self.rows)]


class WatchedTrainer(Trainer):
    """The Trainer of transformers with our optimizer's groups and rows in order. It keeps the last
    loss."""

    def __init__(self, *, update: Update, matrices: frozenset[str], **settings: Any) -> None:
        super().__init__(**settings)
        self.update, self.matrices = update, matrices
        self.last_loss = torch.zeros(())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        named = dict((self.model if model is None else model).named_parameters())
        self.optimizer = self.update.adamw(named, self.matrices)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss


class TakesTurns(TrainerCallback):
    """A callback that lets the Trainer's own loop go on by one step a turn: a turn is all that the
    loop does until the next step begins, the next batch included."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.trainer = turns, None
        self.is_in_step = False

    def on_step_begin(self, *about: Any, **more: Any) -> None:
        if self.is_in_step:
            seconds = self.turns.seconds()
            loss = self.trainer.last_loss.double()
            dist.all_reduce(loss)
            self.turns.end((float(loss) / PAIR, float(self.trainer.deepspeed.get_global_grad_norm())), seconds)
        self.is_in_step = True
        self.turns.begin()


def trainer_loop(shape: Shape, dtype: Dtype, folder: Path, *, zero: Mapping[str, Any]) -> Loop:
    """Return the loop of transformers' Trainer with accelerate's DeepSpeed at a ZeRO stage."""
    network = shape.network()
    first = FirstWeights.of(network, seed=SEED)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": dict(zero),
        # The update is the same on all sides: torch's fused AdamW.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    use_threads_where_async_io_is_missing()  # it could not swap at all without libaio
    # accelerate takes no CPU for DeepSpeed's unless its state is made before the Trainer's.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=shape.micro_sequences,
        max_steps=ENDLESS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_NORM,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        bf16=dtype == "bf16",
        deepspeed=config,
    )

    def loop(turns: Turns) -> None:
        takes_turns = TakesTurns(turns)
        takes_turns.trainer = WatchedTrainer(
            update=peers_update(),
            matrices=first.matrices,
            model=hugging_face_model(network, first),
            args=arguments,
            train_dataset=SameRows(shape),
            callbacks=[takes_turns],
        )
        takes_turns.trainer.train()

    return loop


def pipeline_engine_loop(shape: Shape, dtype: Dtype, folder: Path, *, batches: Sequence[MicroBatch]) -> Loop:
    """Return the loop of DeepSpeed's PipelineEngine over our blocks."""
    engine = DeepSpeedPipeline(shape, dtype, len(batches[0].documents.lengths), len(batches))
    return step_by_step(partial(engine.step, batches))


class DeepSpeedPipeline:
    """The same blocks, weights and update in DeepSpeed's own pipeline, which runs 1F1B."""

    def __init__(self, shape: Shape, dtype: Dtype, micro_sequences: int, micro_batches: int) -> None:
        stage = whole_model(shape.network(), DTYPES[dtype], seed=SEED)
        documents = Documents.whole_rows(micro_sequences, shape.seq_len)
        blocks = [
            _InPipeline(stage, stage.embedding, documents),
            *(_InPipeline(stage, layer, documents) for layer in stage.layers.values()),
            _InPipeline(stage, stage.head.norm, documents),
        ]
        blocks[-1].output = stage.head.output
        self.num_targets = 1
        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)

        def loss(h_ND: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
            # DeepSpeed averages over the micro-batches.
            return stage.head.output.loss_sum(h_ND, labels_BS.flatten()) * (micro_batches / self.num_targets)

        model = PipelineModule(blocks, num_stages=PAIR, loss_fn=loss, partition_method="uniform")
        specs = {id(parameter): spec for _, parameter, spec in owned_specs(stage)}
        parameters = [(parameter, specs[id(parameter)]) for parameter in model.parameters()]
        optimizer = make_optimizer(Recipe.model_validate({"optimizer": {"lr": LR}}), parameters, CPU)
        config = {
            "train_micro_batch_size_per_gpu": micro_sequences,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": CLIP_NORM,
            "steps_per_print": 1_000_000,
        }
        for parameter, _ in parameters:
            parameter.model_parallel = True
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.parameters = [parameter for parameter, _ in parameters]
        self.engine.clip_fp32_gradients = self.clip  # DeepSpeed's keeps the norm to itself

    def clip(self) -> None:
        square = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters]).square()
        dist.all_reduce(square)
        self.norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, CLIP_NORM, self.norm)

    def step(self, batches: Sequence[MicroBatch]) -> Numbers:
        self.num_targets = sum(batch.num_targets for batch in batches)
        loss = self.engine.train_batch(iter([(batch.tokens_BS, batch.labels_BS) for batch in batches]))
        return float(loss), float(self.norm)


class _InPipeline(nn.Module):
    """A block that takes one tensor, as DeepSpeed's pipeline passes one; its documents are whole
    rows."""

    def __init__(self, stage: Stage, block: nn.Module, documents: Documents) -> None:
        super().__init__()
        self.block = block
        # In a tuple, so the stage is no child module.
        self._stage, self._documents = (stage,), documents

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (stage,) = self._stage
        if self.block is stage.embedding:
            return self.block(x, self._documents, None)
        if stage.head is not None and self.block is stage.head.norm:
            return self.block(x)
        return self.block(x, self._documents, stage._rotation(self._documents, x.device), None)
