"""The tables of ds_configs/README.md, against the recipes: their data, passes, base models, and the machines they fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pages import ROOT, Page
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.recipe import ResolvedRecipe, load
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.memory_check import Machine, require_memory
from trainer.schema import STDLIB
from trainer.tasks import TASKS

PAGE = Page.read(ROOT / "ds_configs" / "README.md")
RECIPES = sorted((ROOT / "ds_configs").glob("*.json"))
SCALES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# The config.json of base models on the hub, as far as they say how much memory is needed.
LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
ON_THE_HUB: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        **LLAMA_3,
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
    "meta-llama/Meta-Llama-3-70B-Instruct": {
        **LLAMA_3,
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    },
    "Qwen/Qwen3-8B": {
        **{"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "max_position_embeddings": 40960},
        **{
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "head_dim": 128,
        },
    },
}
STATES_BYTES = 12  # of AdamW in mixed precision: a master weight and two moments in fp32
HOST_GB = 512  # of a node, where the table does not say; estimates on the safe side are in its GPUs


def table(page: Page, heading: str) -> dict[str, list[str]]:
    """Return the rows of the table under a heading, by recipe."""
    return {cells[0].strip("`"): cells[1:] for _, cells in page.section(heading).rows if cells[0].startswith("`")}


MACHINES = table(PAGE, "The recipes")
LEARNT = table(PAGE, "What they learn from, and how often")


def tokens_of(cell: str) -> float | None:
    """Return the number of tokens that a cell names; None for rows."""
    found = re.match(r"([\d.]+) ([kMBT]?) ?tokens", cell)
    return float(found[1]) * SCALES[found[2]] if found else None


def wrong_row(resolved: ResolvedRecipe, row: list[str]) -> Iterator[str]:
    """Yield what a row of the second table says otherwise than its recipe."""
    recipe, (named, kind, size, passes, base) = resolved.recipe, row
    for source in recipe.data.sources:
        if f"`{source.path}`" not in named:
            yield f"learns from {source.path}"
    if kind != (TASKS[recipe.data.task].rows or "texts"):
        yield f"its rows are not {kind}"
    drawn = recipe.train.steps * recipe.batch.global_sequences * recipe.data.row_tokens
    said = f"{drawn / tokens:.2g}" if (tokens := tokens_of(size)) else "said at the start"
    if passes != said:
        yield f"passes: {said}"
    if recipe.model.from_pretrained != (base.split("`")[1] if base else None):
        yield f"base model: {recipe.model.from_pretrained}"
    if TASKS[recipe.data.task].answers and "chat template" not in base:
        yield "a base model may have no chat template"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_learns_from_what_its_row_says(path: Path) -> None:
    resolved = load(path)
    assert list(wrong_row(resolved, LEARNT[path.name])) == []
    recipe, description = resolved.recipe, json.loads(path.read_text())["description"]
    assert recipe.data.tokenizer == recipe.model.from_pretrained or recipe.model.from_pretrained is None
    for source in recipe.data.sources:
        name = "standard library" if source.path == STDLIB else source.path
        assert name in description, "a recipe says itself where its data come from"
    if TASKS[recipe.data.task].answers:
        assert "chat template" in description


def test_the_tables_have_the_recipes_and_no_others() -> None:
    names = {path.name for path in RECIPES}
    assert set(MACHINES) == names
    assert set(LEARNT) == names


def test_only_the_quick_start_learns_the_standard_library() -> None:
    learn_it = [path.stem for path in RECIPES if any(source.path == STDLIB for source in load(path).recipe.data.sources)]
    assert learn_it == ["quickstart"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: "`corpus`"}, "learns from stdlib"),
        ({1: "pairs"}, "its rows are not pairs"),
        ({2: "5 M tokens"}, "passes: 0.47"),
        ({2: "9 rows"}, "passes: said at the start"),
        ({4: "`owner/name`"}, "base model: None"),
    ],
)
def test_a_row_that_differs_is_found(change: dict[int, str], said: str) -> None:
    row = [change.get(number, cell) for number, cell in enumerate(LEARNT["quickstart.json"])]
    assert said in list(wrong_row(load(ROOT / "ds_configs" / "quickstart.json"), row))


# ------------------------------------------------------------------------------------------------------------ machines


def machine_of(cell: str) -> tuple[int, Machine]:
    """Return the ranks of the least machine that a cell names, and the memory of each."""
    nodes = int(found[1]) if (found := re.search(r"groups of (\d+) nodes", cell)) else 1
    if cores := re.fullmatch(r"(\d+) CPU cores?", cell):
        return int(cores[1]), Machine(host_bytes=4 * 10**9, local_ranks=int(cores[1]), gpu_bytes=None)
    gpus, gigabytes = re.search(r"(\d+)(?:–\d+)? GPUs?, (\d+)(?:–\d+)? GB", cell).groups()  # type: ignore[union-attr]
    host = re.search(r"(\d+) GB of host memory", cell)
    in_host = (int(host[1]) if host else HOST_GB) * 10**9
    return int(gpus) * nodes, Machine(host_bytes=in_host, local_ranks=int(gpus), gpu_bytes=int(gigabytes) * 10**9)


def network_of(resolved: ResolvedRecipe) -> TransformerConfig:
    pretrained = ON_THE_HUB.get(resolved.recipe.model.from_pretrained or "")
    return resolved.network(vocab_size=None if pretrained else 32000, pretrained=pretrained, classes=("0", "1"))


def state_bytes(resolved: ResolvedRecipe, network: TransformerConfig, plan: BatchPlan) -> float:
    """Return what weights, gradients and optimizer state of a rank take on its device, all trained, in half precision."""
    from trainer.costs.blocks import count_parameters

    recipe, zero = resolved.recipe, resolved.recipe.zero
    if recipe.tuning.method is not None or zero.offload_optimizer.device != "none":
        return 0.0  # few are trained, or they wait elsewhere
    elements = count_parameters(network) / (recipe.parallel.tensor * recipe.parallel.pipeline)
    weights, gradients = (2 / (plan.dp if zero.stage >= least else 1) for least in (3, 2))
    return elements * (weights + gradients + STATES_BYTES / (plan.dp if zero.stage else 1))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_machine_of_its_row(path: Path) -> None:
    resolved = load(path)
    world_size, machine = machine_of(MACHINES[path.name][1])
    network = network_of(resolved)
    plan = BatchPlan.from_recipe(resolved.recipe, world_size, "the table")
    require_memory(resolved.recipe, plan, network, machine)
    if machine.gpu_bytes is not None:
        assert state_bytes(resolved, network, plan) < 0.8 * machine.gpu_bytes, "activations need room too"


def test_a_machine_that_is_too_small_is_found() -> None:
    resolved = load(ROOT / "ds_configs" / "llama3_8b_sft_tp2_pp2.json")
    world_size, machine = machine_of("8 GPUs, 2 GB")
    plan = BatchPlan.from_recipe(resolved.recipe, world_size, "the table")
    with pytest.raises(RecipeError, match="a rank needs at least"):
        require_memory(resolved.recipe, plan, network_of(resolved), machine)
