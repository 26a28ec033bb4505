"""torch's own parallelism around transformers' Llama: DDP, FSDP2, DTensor's plan for tensors, and
pipelining."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from contenders import Loop, step_by_step
from contest import CLIP_NORM, PAIR, SEED, Shape, peers_update
from hugging_face_peer import CPU, FirstWeights, hugging_face_inputs, hugging_face_model
from plain_loop import Numbers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn import functional
from transformers import LlamaForCausalLM

from trainer.data.loader import MicroBatch
from trainer.engine.execution import DTYPES
from trainer.schema import Dtype


class TorchLoop:
    """A loop with the optimizer, clipping and normalisation of our recipe.

    In bf16 all hold fp32 weights, which are cast for use (FSDP2's policy, autocast elsewhere), and
    reduce gradients in fp32, as our engine does.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], matrices: Collection[str], *, is_spread: bool = False
    ) -> None:
        """Take a function that does forward and backward, and returns the loss of both ranks'
        rows. `is_spread`: the ranks hold different parameters, no DTensors."""
        self.model, self.loss, self.is_spread = model, loss, is_spread
        named = dict(model.named_parameters())
        # DTensors and plain ones are never in one call.
        kinds = [{n: p for n, p in named.items() if isinstance(p, DTensor) is kind} for kind in (True, False)]
        self.kinds = [list(kind.values()) for kind in kinds if kind]
        update = peers_update()
        groups = [group for kind in kinds for group in update.groups(kind, matrices) if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=update.lr, betas=update.betas, eps=update.eps, fused=True)

    def step(self) -> Numbers:
        loss = self.loss()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), norm

    def _clip(self) -> float:
        square = torch.zeros(())
        for parameters in self.kinds:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            square += (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        if self.is_spread:
            dist.all_reduce(square)
        norm = square.sqrt()
        for parameters in self.kinds:
            nn.utils.clip_grads_with_norm_(parameters, CLIP_NORM, norm)
        return float(norm)


def precision_of(dtype: Dtype) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", DTYPES[dtype]) if dtype != "fp32" else contextlib.nullcontext()


def mean_over_ranks(loss: Tensor) -> Tensor:
    whole = loss.detach().double()
    dist.all_reduce(whole)
    return whole / PAIR


def data_parallel_loop(shape: Shape, dtype: Dtype, folder: Path, *, wrap: Callable[[nn.Module, Dtype], nn.Module]) -> Loop:
    """Return the loop of a model that each rank feeds its own rows."""
    network = shape.network()
    first = FirstWeights.of(network, seed=SEED)
    model = hugging_face_model(network, first)
    wrapped = wrap(model, dtype)
    inputs = hugging_face_inputs(shape.batch(SEED + dist.get_rank(), documents=1), CPU)

    def loss() -> Tensor:
        with precision_of("fp32" if wrapped is model else dtype):
            mean: Tensor = wrapped(**inputs).loss
        mean.backward()
        return mean_over_ranks(mean)

    return step_by_step(TorchLoop(model, loss, first.matrices).step)


def ddp(model: nn.Module, dtype: Dtype) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: LlamaForCausalLM, dtype: Dtype, *, keeps_weights: bool) -> nn.Module:
    """Divide in place. `keeps_weights`: what is gathered for the forward stays for the backward, as
    at ZeRO-2."""
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=not keeps_weights)
    return fully_shard(model, mp_policy=policy, reshard_after_forward=not keeps_weights)


def tensor_plan(*, by_sequence: bool) -> dict[str, ParallelStyle]:
    """Return the field's plan for a Llama: columns, then rows; the loss over a divided
    vocabulary."""
    whole, part = Replicate(), Shard(1)
    between = part if by_sequence else whole
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    layer: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
    layer |= {name: RowwiseParallel(output_layouts=between) for name in ("self_attn.o_proj", "mlp.down_proj")}
    if by_sequence:
        states = {"hidden_states": part}, {"hidden_states": whole}
        layer |= {name: SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
        layer["self_attn"] = PrepareModuleInput(input_kwarg_layouts=states[0], desired_input_kwarg_layouts=states[1])
        layer["mlp"] = PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(whole,))
        plan["model.norm"] = SequenceParallel()
    return plan | {f"model.layers.*.{name}": style for name, style in layer.items()}


def tensor_loop(shape: Shape, dtype: Dtype, folder: Path, *, batch: MicroBatch, by_sequence: bool) -> Loop:
    """Return the loop of a model whose matrices are divided over both ranks, by DTensor."""
    network = shape.network()
    first = FirstWeights.of(network, seed=SEED)
    model = hugging_face_model(network, first)
    parallelize_module(model, init_device_mesh("cpu", (PAIR,)), tensor_plan(by_sequence=by_sequence))
    # Positions are given: the model would count those of the part of a row that it sees.
    inputs = {**hugging_face_inputs(batch, CPU), "position_ids": torch.arange(shape.seq_len)[None]}

    def loss() -> Tensor:
        with loss_parallel():
            with precision_of(dtype):
                mean: Tensor = model(**inputs).loss
            mean.backward()
        whole = mean.detach()
        return whole.full_tensor() if isinstance(whole, DTensor) else whole

    return step_by_step(TorchLoop(model, loss, first.matrices).step)


class HalfLlama(nn.Module):
    """The half of transformers' model that one rank of two computes: its own layers, and the
    embedding before them or the head after."""

    def __init__(self, whole: LlamaForCausalLM, rank: int) -> None:
        super().__init__()
        count = len(whole.model.layers) // PAIR
        last = rank == PAIR - 1
        first = count * rank
        # The names are those of the whole model, where the decay is decided.
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(first + i): whole.model.layers[first + i] for i in range(count)})
        self.model.embed_tokens = None if last else whole.model.embed_tokens
        self.model.norm = whole.model.norm if last else None
        self.lm_head = whole.lm_head if last else None
        self.rotary = whole.model.rotary_emb

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.model.embed_tokens is None else self.model.embed_tokens(x)
        positions = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.model.layers.values():
            hidden = layer(hidden, position_embeddings=positions)
        return hidden if self.lm_head is None else self.lm_head(self.model.norm(hidden))


def pipeline_loop(shape: Shape, dtype: Dtype, folder: Path, *, batches: Sequence[MicroBatch]) -> Loop:
    """Return the loop of torch's own 1F1B over two halves of the model."""
    rank, network = dist.get_rank(), shape.network()
    first = FirstWeights.of(network, seed=SEED)
    half = HalfLlama(hugging_face_model(network, first), rank)
    tokens, labels = torch.cat([b.tokens_BS for b in batches]), torch.cat([b.labels_BS for b in batches])

    def loss_of(logits: Tensor, labels_BS: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float().flatten(0, 1), labels_BS.flatten())

    # It divides gradients by the number of micro-batches.
    schedule = Schedule1F1B(PipelineStage(half, rank, PAIR, CPU), len(batches), loss_fn=loss_of)

    def loss() -> Tensor:
        losses: list[Tensor] = []
        with precision_of(dtype):
            if rank == 0:
                schedule.step(tokens)
            else:
                schedule.step(target=labels, losses=losses)
        total = torch.stack([loss.detach() for loss in losses]).mean() if losses else torch.zeros(())
        return mean_over_ranks(total * PAIR)

    return step_by_step(TorchLoop(half, loss, first.matrices, is_spread=True).step)
