"""Rows of new tokens that are trained beside a frozen network: against peft's own, and every layout against one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from parallel import loss, ties
from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import ShardSpec
from parallel.topology import Layout
from parallel.vocabulary import VocabularyMatrix
from tests.parallel.training import SHAPES, Case, Outcome, S, assert_same_training, make_engine, outcome, rows_of_step, run_case
from tests.spawn import spawn
from tools.campaign import exactness, reshard
from tools.campaign.cases import WAYS, arguments, digests, write_recipe
from tools.campaign.ranks import run_ranks, train
from trainer.model import transformer
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import assembled, write_folder
from trainer.tuning.adapter_folder import AdapterFormat, write_adapter
from trainer.tuning.targets import TOKEN_ROWS, is_added

# peft 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 20
LORA = {"method": "lora", "rank": 4, "alpha": 8.0}
TOKENS = (3, 5, 40, 65, 66)  # of 67: on both of two tensor ranks (34 rows each), and of four (17 each) not on the second
UNTIED = {"tie_word_embeddings": False}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def network_of(case: Case) -> Any:
    return replace(from_hf(case.family, {**SHAPES[case.family], **case.config}), new_tokens=case.new_tokens)


def start_folders(mesh: Mesh, case: Case, base: Path, adapter: Path) -> None:
    """The base and the adapter that a run of the case begins with."""
    engine = make_engine(mesh, case)
    tensors = dict(assembled(engine.gathered_tensors()))
    network = network_of(case)
    config = to_hf(network, dtype="float32", eos_token_id=None)
    own = [(spec, tensor.clone()) for spec, tensor in engine.local_tensors() if not spec.added]
    write_folder(own, base, dtype=torch.float32, config=config, save_beside=lambda folder: None)
    form = AdapterFormat.of(engine.recipe, network)
    write_adapter(tensors.items(), adapter, dtype=torch.float32, form=form, save_beside=lambda folder: None)
    engine.close()


def steps_of_peft(base: Path, adapter: Path, case: Case) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of the case's steps by peft, transformers and torch alone, and the rows as they are then, by our names."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and (".lora_" in name) is decayed],
            "weight_decay": 0.01 if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    rule = torch.optim.AdamW(groups, lr=case.optimizer["lr"], betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(case.steps):
        tokens, labels = rows_of_step(step, case.sequences)
        loss = torch.zeros(())
        for part in (slice(0, S - 5), slice(S - 5, S)):
            logits = model(input_ids=tokens[:, part]).logits
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1), labels[:, part].flatten(), ignore_index=IGNORE, reduction="sum"
            )
        loss = loss / (labels != IGNORE).sum()
        rule.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, case.clip_norm)
        rule.step()
        losses.append(loss.item())
    rows = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p.detach().numpy()
        for name, p in model.named_parameters()
        if "trainable_tokens_delta" in name
    }
    return losses, rows


AGAINST_PEFT = {
    "tied": {},
    "untied": {"config": UNTIED},
    "gpt2": {"family": "gpt2", "config": NO_DROPOUT},
}


@pytest.mark.parametrize("name", AGAINST_PEFT)
def test_twenty_steps_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    """Of peft's trainable_token_indices, beside an adapter."""
    case = Case(tuning=LORA, new_tokens=TOKENS, optimizer={"name": "adamw", "lr": 0.01}, steps=STEPS, clip_norm=0.1)
    case = replace(case, **AGAINST_PEFT[name])
    spawn(start_folders, Layout(), case, tmp_path / "base", tmp_path / "adapter")
    expected, rows = steps_of_peft(tmp_path / "base", tmp_path / "adapter", case)
    got = outcome(case)
    # fp32, two implementations of one network: seen 1e-7 relative.
    np.testing.assert_allclose(got.losses, expected, rtol=1e-5)
    own = {name: weight for name, weight in got.weights.items() if name.endswith(TOKEN_ROWS)}
    assert len(own) == (2 if case.config == UNTIED else 1)
    for name, row in own.items():
        # Adam divides by the root of small second moments, which magnifies rounding: seen 3e-5 after twenty steps of 0.01.
        np.testing.assert_allclose(row, rows[name], rtol=0, atol=2e-4, err_msg=name)
        start = got.weights[name.removesuffix(TOKEN_ROWS) + ".weight"][list(TOKENS)]
        assert np.abs(row - start).max() > 0.05, "the rows were not trained"


# ------------------------------------------------------------------------------------------------ layouts

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": False},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2, "accumulation": 4},
    "tp2xpp2": {"tp": 2, "pp": 2, "accumulation": 2},
    "split-backward": {"pp": 2, "accumulation": 4, "schedule": "zbv", "virtual_stages": 2, "stage": 2},
    "pp2-zero3": {"pp": 2, "dp": 2, "accumulation": 2, "stage": 3},
    "dp2-zero1": {"dp": 2, "stage": 1},
    "dp2-zero2": {"dp": 2, "stage": 2},
    "dp2-zero3": {"dp": 2, "stage": 3},
    "dp2-zero3-cpu": {
        "dp": 2,
        "stage": 3,
        "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
    "tp2xdp2-zero3": {"tp": 2, "dp": 2, "stage": 3},
    "full-recompute": {"tp": 2, "dp": 2, "stage": 1, "recompute": "full"},
}
DEEP: dict[str, Any] = {"num_hidden_layers": 4}
BEGINNINGS: dict[str, Case] = {
    "tied": Case(tuning=LORA, new_tokens=TOKENS, clip_norm=0.1, config=DEEP),
    "untied": Case(tuning=LORA, new_tokens=TOKENS, clip_norm=0.1, config={**DEEP, **UNTIED}),
    "bitfit": Case(family="gpt2", tuning={"method": "bitfit"}, new_tokens=TOKENS, clip_norm=0.1, config={"n_layer": 4}),
    "ia3": Case(tuning={"method": "ia3"}, new_tokens=TOKENS, clip_norm=0.1, config=DEEP),
    "adapter": Case(tuning={"method": "adapter", "bottleneck": 6}, new_tokens=TOKENS, clip_norm=0.1, config=DEEP),
}
EVERY_DAY = {
    ("tied", "tp2xpp2"),
    ("tied", "split-backward"),
    ("untied", "tp2"),
    ("untied", "dp2-zero3"),
    ("bitfit", "dp2-zero2"),
}


@pytest.fixture(scope="module")
def one_process() -> Callable[[str], Outcome]:
    return cache(lambda name: outcome(BEGINNINGS[name]))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in EVERY_DAY else [pytest.mark.grid])
        for name in BEGINNINGS
        for layout in LAYOUTS
    ],
)
def test_rows_train_alike_in_every_layout(name: str, layout: str, one_process: Callable[[str], Outcome]) -> None:
    expected = one_process(name)
    got = outcome(replace(BEGINNINGS[name], **LAYOUTS[layout]))
    assert got.initial_hash == expected.initial_hash
    # SGD shows the gradient itself: fp32 sums in another order, seen 3e-7 in the norm and 2e-8 in the weights.
    assert_same_training(got, expected, relative=2e-6, weights=1e-6)


def test_only_the_rows_and_the_adapter_are_trained(one_process: Callable[[str], Outcome]) -> None:
    trained = one_process("untied")
    start = outcome(replace(BEGINNINGS["untied"], steps=0))
    changed = {name for name, weight in trained.weights.items() if not np.array_equal(weight, start.weights[name])}
    assert changed == {name for name in trained.weights if is_added(name)}
    for weight in ("model.embed_tokens", "lm_head"):
        rows = start.weights[f"{weight}{TOKEN_ROWS}"]
        np.testing.assert_array_equal(rows, start.weights[f"{weight}.weight"][list(TOKENS)])
        assert (np.abs(trained.weights[f"{weight}{TOKEN_ROWS}"] - rows).max(-1) > 1e-5).all(), "a row was not trained"


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.grid), 1, pytest.param(3, marks=pytest.mark.grid)])
def test_in_bf16_rows_keep_their_fp32_values(stage: int) -> None:
    """A step smaller than bf16 can tell from the row is not lost."""
    case = Case(tuning=LORA, new_tokens=TOKENS, dtype="bf16", stage=stage, optimizer={"name": "sgd", "lr": 1e-3}, steps=8)
    expected = outcome(replace(case, dtype="fp32"))
    got = outcome(case)
    name = f"model.embed_tokens{TOKEN_ROWS}"
    start = outcome(replace(case, dtype="fp32", steps=0)).weights[name]
    moved, moved_in_bf16 = expected.weights[name] - start, got.weights[name] - start
    if stage:  # weights are held in bf16 beside their fp32 masters: what is seen is rounded to 2^-8 of the row
        moved_in_bf16 = moved_in_bf16[np.abs(start) < np.abs(moved)]
        moved = moved[np.abs(start) < np.abs(moved)]
    np.testing.assert_allclose(moved_in_bf16, moved, atol=0.05 * np.abs(moved).max())


# ------------------------------------------------------------------------------------------------ checkpoints

# Words of the campaigns' text; "7" is a byte already, so that both of two tensor ranks have rows.
WORDS = {"tuning": LORA, "data": {"new_tokens": ["times", "remainder", "7"]}}
BY_NAME = {way.name: way for way in WAYS}


def test_a_checkpoint_with_rows_is_read_in_other_layouts(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=4, every=4, keep=9, **WORDS)
    ended = run_ranks(train, arguments(recipe, tmp_path / "run", BY_NAME["one"]), world_size=1, log=tmp_path / "log")
    assert ended.codes == (0,), ended.said
    checkpoint = start = tmp_path / "run" / "checkpoints" / "step-00000004"
    states = [name for name in digests(start) if TOKEN_ROWS in name]
    assert states == [f"transformer.wte{TOKEN_ROWS} {state}" for state in ("weight", "exp_avg", "exp_avg_sq")]
    for name in ("tp2xpp2", "dp2-zero3"):
        way, run = BY_NAME[name], tmp_path / name
        ended = reshard.load_and_save(way, recipe, run, checkpoint, log=tmp_path / "log")
        assert not any(ended.codes), ended.said
        checkpoint = run / "checkpoints" / checkpoint.name
        assert digests(checkpoint) == digests(start), name


@pytest.mark.grid
@pytest.mark.parametrize("name", ["one", "tp2xpp2", "dp2-zero3"])
def test_a_resumed_run_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    assert exactness.run(BY_NAME[name], "bf16", 4, 2, tmp_path, **WORDS) == (2, 2)


# ------------------------------------------------------------------------------------------------ mistakes are caught


def rows_of_the_first_tensor_rank_only() -> None:
    """What other ranks have of the rows does not learn."""
    materialise = transformer.materialise

    def idle_elsewhere(block: nn.Module, device: torch.device) -> None:
        materialise(block, device)
        for matrix in block.modules():
            if isinstance(matrix, VocabularyMatrix) and "token_rows" in matrix.specs and matrix.tp.group.rank:
                matrix.token_rows.register_hook(torch.zeros_like)

    transformer.materialise = idle_elsewhere


def gradient_through_the_frozen_rows() -> None:
    """What passes on to the hidden states comes through rows that are not there any more."""
    add = loss._Gradients.add

    def adding(gradients: Any, part: slice, of_logits: torch.Tensor) -> None:
        add(gradients, part, of_logits)
        gradients.h[part] = of_logits @ gradients._vocabulary.weight_VD

    loss._Gradients.add = adding


def rows_of_other_tokens() -> None:
    """A rank's rows stand in the place of their neighbours."""
    train_rows = VocabularyMatrix.train_rows

    def shifted(matrix: VocabularyMatrix, tokens: Any, name: str) -> None:
        train_rows(matrix, tokens, name)
        matrix.places = tuple(place - matrix.tp.group.rank for place in matrix.places)

    VocabularyMatrix.train_rows = shifted


def tied_rows_not_summed() -> None:
    """The first and the last stage each train their copy on their own gradient."""
    ties.all_reduce = lambda tensor, group: tensor


def tied_rows_counted_twice() -> None:
    """The gradient norm counts both copies."""
    ShardSpec.owned = property(lambda spec: spec.tied or spec.copies.rank == 0)


def mutated(mesh: Mesh, mutate: Callable[[], None], case: Case) -> Outcome:
    mutate()
    return run_case(mesh, case)


@pytest.mark.parametrize(
    ("mutate", "layout"),
    [
        (rows_of_the_first_tensor_rank_only, {"tp": 2}),
        (rows_of_other_tokens, {"tp": 2}),
        (gradient_through_the_frozen_rows, {"tp": 2}),
        (tied_rows_not_summed, {"pp": 2, "accumulation": 2}),
        (tied_rows_counted_twice, {"pp": 2, "accumulation": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_parity_check_catches(
    mutate: Callable[[], None], layout: dict[str, int], one_process: Callable[[str], Outcome]
) -> None:
    case = replace(BEGINNINGS["tied"], **layout)
    got = spawn(mutated, Layout(tp=case.tp, pp=case.pp), mutate, case)[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, one_process("tied"), relative=2e-6, weights=1e-6)
