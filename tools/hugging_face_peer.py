"""The Llama of transformers, started from Triaxis's first weights, for the peers to train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from parallel.gather import logical_tensors
from parallel.params import Role, initialise, owned_specs
from parallel.tensor import TensorParallel
from trainer.data.loader import MicroBatch
from trainer.model.blocks import blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import to_hf
from trainer.model.transformer import Stage

CPU = torch.device("cpu")


def whole_model(network: TransformerConfig, dtype: torch.dtype, *, seed: int) -> Stage:
    """Return our model as one undivided module on the CPU."""
    return Stage(
        network,
        blocks_of(network),
        dtype=dtype,
        recompute="none",
        tp=TensorParallel.alone(),
        device=CPU,
        fill=lambda block: initialise(block, seed=seed),
    )


@dataclass(frozen=True)
class FirstWeights:
    """The fp32 weights that all contenders start from, by Hugging Face's names, and the names of
    the matrices: what decays."""

    tensors: dict[str, Tensor]
    matrices: frozenset[str]

    @classmethod
    def of(cls, network: TransformerConfig, *, seed: int) -> FirstWeights:
        owned = [(spec, p.detach()) for _, p, spec in owned_specs(whole_model(network, torch.float32, seed=seed))]
        matrices = frozenset(piece.name for spec, _ in owned if spec.role is Role.MATRIX for piece in spec.pieces)
        return cls(logical_tensors(owned), matrices)


def hugging_face_model(network: TransformerConfig, first: FirstWeights) -> LlamaForCausalLM:
    """Return the model in fp32, with sdpa attention, in training mode."""
    config = LlamaConfig(
        **{**to_hf(network, dtype="float32", eos_token_id=None), "use_cache": False}, attn_implementation="sdpa"
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(first.tensors)
    return model.train()


def hugging_face_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """Return the batch as keyword arguments of transformers. Whole rows need no mask: sdpa's own
    causal kernel serves them.

    Packed rows get positions that restart and an explicit block-diagonal causal mask, bool [B, 1,
    S, S]. It is made here, once, outside the peer's time.
    """
    inputs = {"input_ids": batch.tokens_BS, "labels": batch.labels_BS, "shift_labels": batch.labels_BS}
    if any(len(row) > 1 for row in batch.documents.lengths):
        document_BS = torch.stack(
            [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in batch.documents.lengths]
        )
        same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
        inputs["attention_mask"] = same_BSS.tril()[:, None]
        inputs["position_ids"] = batch.documents.positions_BS
    return {name: tensor.to(device) for name, tensor in inputs.items()}
