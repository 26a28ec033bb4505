"""The planner's activations are what autograd keeps in real steps, at their peak over the whole schedule, on every rank.

Within 0.5 %: LayerNorm's means are counted in fp32, as GPUs keep them; the CPU keeps them in the format of its input.
Within 3 % where a bias by distance, or what tuning puts beside a layer, keeps small tensors that are not counted, and where
gradients of weights wait, whose tensors are there for a moment together with those that they replace.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.documents import Documents
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from tests.parallel.saved_tensors import kept_tensors
from tests.parallel.training import SHAPES, Case, V, make_engine, micro_batches, rows_of_step
from tests.spawn import spawn
from trainer.data.loader import MicroBatch
from trainer.model.blocks import blocks_of
from trainer.model.heads import Objective
from trainer.model.hf_config import from_hf
from trainer.model.preference_losses import Pairs
from trainer.model.transformer import Stage
from trainer.planner.activations import Rows, Saving
from trainer.planner.in_flight import Kept, most_in_flight
from trainer.planner.memory import saving, stages_of_ranks
from trainer.recipe.pipeline import schedule_table
from trainer.schema import Preference

TOLERANCE, ROUGH = 0.005, 0.03
PACKED, WHOLE = (11, 5), (16,)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {**WIDE, "vocab_size": V, "num_hidden_layers": 2, "max_position_embeddings": 64}
QWEN3 = {**COMMON, "head_dim": 32}
GEMMA2 = {**QWEN3, "query_pre_attn_scalar": 32, "sliding_window": 8}
GPT2 = {**SHAPES["gpt2"], "n_embd": 64}
DROPPED = {**GPT2, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
FIVE = {**COMMON, "num_hidden_layers": 5, "tie_word_embeddings": False}
PIPELINE = {"family": "llama", "config": FIVE, "stage": 1, "pp": 2, "accumulation": 4}

LAYOUTS: dict[str, tuple[Case, tuple[int, ...]]] = {
    "llama": (Case(config=WIDE, stage=1), WHOLE),
    "llama-packed": (Case(config=WIDE, stage=1), PACKED),
    "llama-selective": (Case(config=WIDE, stage=1, recompute="selective"), PACKED),
    "llama-full": (Case(config=WIDE, stage=1, recompute="full"), WHOLE),
    "llama-casts": (Case(config=WIDE, stage=0, dtype="bf16"), WHOLE),
    "gpt2": (Case(family="gpt2", config=GPT2, stage=1), WHOLE),
    "gpt2-dropout": (Case(family="gpt2", config=DROPPED, stage=1, dtype="bf16"), PACKED),
    "gpt2-dropout-selective": (Case(family="gpt2", config=DROPPED, stage=1, recompute="selective"), WHOLE),
    "gpt2-relu": (Case(family="gpt2", config={**GPT2, "activation_function": "relu"}, stage=1), WHOLE),
    "gpt2-tensor": (Case(family="gpt2", config=GPT2, stage=1, tp=2, dtype="bf16"), WHOLE),
    "qwen3": (Case(family="qwen3", config=QWEN3, stage=1), PACKED),
    "qwen3-selective": (Case(family="qwen3", config=QWEN3, stage=1, recompute="selective"), PACKED),
    "qwen3-tensor-full": (Case(family="qwen3", config=QWEN3, stage=1, tp=2, recompute="full"), WHOLE),
    "gemma2": (Case(family="gemma2", config=GEMMA2, stage=1, dtype="bf16"), PACKED),
    "gemma2-selective": (Case(family="gemma2", config=GEMMA2, stage=1, recompute="selective"), WHOLE),
    "window": (Case(family="mistral", config={**COMMON, "sliding_window": 8}, stage=1), PACKED),
    "tensor-sequence": (Case(config=WIDE, stage=1, tp=2), PACKED),
    "tensor-whole": (Case(config=WIDE, stage=0, dtype="bf16", tp=2, sequence_parallel=False), WHOLE),
    "tensor-shared-keys": (Case(config={**WIDE, "num_key_value_heads": 1}, stage=1, tp=2, recompute="selective"), WHOLE),
    "pipeline": (Case(**PIPELINE), PACKED),
    "pipeline-gpipe-full": (Case(**PIPELINE, schedule="gpipe", recompute="full"), PACKED),
    "pipeline-interleaved": (Case(**PIPELINE, schedule="interleaved_1f1b", virtual_stages=2), WHOLE),
    "pipeline-tensor": (Case(**{**PIPELINE, "accumulation": 2}, tp=2, recompute="selective"), WHOLE),
}
BERT = {
    **{key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
}
MARIAN = {
    **{"vocab_size": V, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "max_position_embeddings": 40},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}
T5 = {
    **{"vocab_size": V, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    **{"relative_attention_num_buckets": 11, "relative_attention_max_distance": 13},
}
LORA = {"method": "lora", "rank": 4}
TALL = {**WIDE, "num_hidden_layers": 6, "intermediate_size": 128}
SIDES = (8, 8)  # a source and its target
ROUGHLY: dict[str, tuple[Case, tuple[int, ...]]] = {
    "bert": (Case(family="bert", config=BERT, stage=1), PACKED),
    "marian": (Case(family="marian", config=MARIAN, stage=1), SIDES),
    "marian-full": (Case(family="marian", config=MARIAN, stage=1, recompute="full"), SIDES),
    "t5": (Case(family="t5", config=T5, stage=1), SIDES),
    "lora": (Case(config=TALL, stage=1, tuning=LORA), WHOLE),
    "lora-two": (Case(config=TALL, stage=1, tuning={**LORA, "targets": ["q", "v"]}, recompute="selective"), WHOLE),
    "lora-quantized": (Case(config=TALL, stage=1, tuning={**LORA, "quantize": "nf4"}), WHOLE),
    "lora-dropped": (Case(config=TALL, stage=1, tuning={**LORA, "dropout": 0.1}), WHOLE),
    "lora-tensor": (Case(config=TALL, stage=1, dtype="bf16", tuning=LORA, tp=2), WHOLE),
    "dora": (Case(config=TALL, stage=1, dtype="bf16", tuning={"method": "dora", "rank": 4}), WHOLE),
    "zero-bubble": (Case(**PIPELINE, schedule="interleaved_zero_bubble", virtual_stages=2), WHOLE),
    "zbv": (Case(**PIPELINE, schedule="zbv", virtual_stages=2), WHOLE),
    "ia3": (Case(config=TALL, stage=1, tuning={"method": "ia3"}), WHOLE),
}
EVERY_DAY = ("llama-packed", "gpt2-dropout", "tensor-sequence", "pipeline")


def kept(mesh: Mesh, case: Case, lengths: tuple[int, ...]) -> tuple[int, int]:
    """The most bytes kept at a time on this rank, and what the planner says, which takes every token for a target."""
    SHAPES.setdefault(case.family, {})
    engine = make_engine(mesh, case)
    recipe, plan, network = engine.recipe, engine.plan, engine.network
    rows = Documents((lengths,) * plan.micro_sequences)
    batches = [
        replace(batch, documents=rows, labels_BS=batch.targets_BS.clamp(min=0)) for batch in micro_batches(mesh, plan, 0)
    ]
    with kept_tensors(address(*(p.data for p, _ in engine.specs), *(batch.tokens_BS for batch in batches))) as found:
        engine.step(batches, step=0, lr=1e-3)
    counted = saving(recipe, network, mesh.layout, Rows(plan.micro_sequences, lengths))
    of_stage = {
        stage: Kept(counted.of_blocks(blocks).total(), counted.deferred(blocks))
        for stage, blocks in stages_of_ranks(recipe, network)[mesh.pp.rank].items()
    }
    if case.pp == 1:
        return found.peak, of_stage[0].until_backward
    steps = schedule_table(recipe, plan).steps[mesh.pp.rank]
    return found.peak, most_in_flight(steps, of_stage).num_bytes(of_stage)


def address(*tensors: torch.Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in EVERY_DAY else [pytest.mark.grid]) for n in LAYOUTS])
def test_activations_of_real_steps(name: str) -> None:
    case, lengths = LAYOUTS[name]
    for real, said in spawn(kept, Layout(tp=case.tp, pp=case.pp), case, lengths):
        assert said == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.grid) for name in ROUGHLY])
def test_activations_of_translations_tuning_and_deferred_gradients(name: str) -> None:
    case, lengths = ROUGHLY[name]
    for real, said in spawn(kept, Layout(tp=case.tp, pp=case.pp), case, lengths):
        assert said == pytest.approx(real, rel=ROUGH)


def kept_of_pairs(mesh: Mesh) -> tuple[int, int]:
    """The bytes that the loss of pairs keeps, and what the planner says."""
    network = from_hf("llama", {**COMMON, "tie_word_embeddings": False})
    stage = Stage(
        network,
        blocks_of(network),
        dtype=torch.float32,
        recompute="full",
        tp=TensorParallel(mesh.tp, sequence=True),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed=0),
        objective=Objective(of_tokens=Pairs(Preference.model_validate({"loss": "orpo"}))),
    )
    tokens, labels = rows_of_step(0, 4)
    rows = Rows(4, (8, 8))  # a chosen and a rejected answer
    batch = MicroBatch(tokens, Documents((rows.lengths,) * rows.number), labels)
    ignored = address(*(p.data for p in stage.parameters()), tokens, labels)
    with kept_tensors(ignored) as found:
        sums = stage(tokens, batch=batch)
    sums[0].backward()
    sizes = {"tensor": mesh.tp.size, "divides_tokens": True, "itemsize": 4}
    counted = Saving(network=network, rows=rows, recompute="full", by_token=True, **sizes)
    return found.peak, counted.of_blocks(blocks_of(network)).total()


@pytest.mark.grid
def test_losses_of_pairs_keep_hidden_states_and_no_gradient() -> None:
    for real, said in spawn(kept_of_pairs, Layout(tp=2)):
        assert said == pytest.approx(real, rel=ROUGH)
