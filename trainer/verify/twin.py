"""The recipe that verify trains: the user's own, or a twin of the same family and options with
smaller sizes. No torch.

Everything that decides how a layer is divided stays: the ratio of query to key/value heads, whether
tensor ranks share key/value heads, windows, ties, biases, dropout, ZeRO stage. What only costs time
shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel.topology import Layout
from trainer.errors import RecipeError
from trainer.fine_tuning import BY_DEVICE
from trainer.model.config import TransformerConfig
from trainer.model.families import FAMILIES
from trainer.recipe import ResolvedRecipe, tokenizer_vocab_size
from trainer.recipe.names import SMALLEST_BPE
from trainer.recipe.network import network_from
from trainer.schema import Recipe, Train
from trainer.tasks import TASKS
from trainer.tuning.targets import QUANTIZED_TOGETHER

# A prime, so that no degree divides it; above the 257 symbols of the tokenizer "bytes".
VOCABULARY = 263
HEAD_DIM = 8
LEAST_LAYERS = 2
LEAST_TOKENS = 24
WINDOW = 5  # tokens; shorter than most documents of a row
PERSISTENCE = 100  # elements: ZeRO-3 divides even the twin's matrices
SIZES = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "max_positions")
NOT_MODEL = ("dtype", "torch_dtype")  # number formats in a Hugging Face folder's config


@dataclass(frozen=True)
class Twin:
    """A recipe to write down, with the differences from the user's in words."""

    given: dict[str, Any]
    changes: list[str]


def network_of(resolved: ResolvedRecipe) -> TransformerConfig:
    """Return the network. RecipeError if it is not known from the recipe alone."""
    vocab_size = tokenizer_vocab_size(resolved.recipe.data)
    if resolved.hf_config is None:
        raise RecipeError("model.from_pretrained is a hub name: to verify it, give the folder to which it was fetched")
    if vocab_size is None and "vocab_size" not in resolved.hf_config:
        raise RecipeError(
            "the vocabulary is known only once data.tokenizer is opened: to verify, add --set model.config.vocab_size=N"
        )
    return resolved.network(vocab_size=vocab_size)


def full_size(resolved: ResolvedRecipe) -> Twin:
    """Return the recipe with its own sizes, without its data."""
    recipe, network = resolved.recipe, network_of(resolved)
    config = {**_own_config(resolved), "vocab_size": network.vocab_size}
    batch = recipe.batch.model_dump()
    given = _recipe(resolved, network.family, config, batch, recipe.data.seq_len)
    return Twin(given, list(_other_changes(resolved)))


def scaled_down(resolved: ResolvedRecipe, layouts: Sequence[Layout]) -> Twin:
    """Return a twin whose sizes all `layouts` divide; each of them must divide the recipe's own
    network."""
    own = network_of(resolved)
    config = _scaled_config(resolved, own, layouts)
    network, findings = network_from(own.family, config, None)
    assert network is not None, findings
    seq_len, batch = _seq_len(layouts), _batch(resolved, layouts)
    given = _recipe(resolved, own.family, config, batch, seq_len)
    sizes: list[tuple[str, int, int]] = [(field, getattr(own, field), getattr(network, field)) for field in SIZES]
    if any(own.windows):
        sizes.append(("window", max(filter(None, own.windows)), WINDOW))
    sizes += [(f"batch.{key}", getattr(resolved.recipe.batch, key), value) for key, value in batch.items()]
    sizes.append(("data.seq_len", resolved.recipe.data.seq_len, seq_len))
    if resolved.recipe.zero.stage == 3:
        threshold = resolved.recipe.zero.stage3_param_persistence_threshold
        given["zero"]["stage3_param_persistence_threshold"] = min(PERSISTENCE, threshold)
        sizes.append(("zero.stage3_param_persistence_threshold", threshold, min(PERSISTENCE, threshold)))
    changes = ["scaled down: " + ", ".join(f"{name} {old:,} → {new:,}" for name, old, new in sizes if old != new)]
    return Twin(given, [*changes, *_other_changes(resolved)])


def _recipe(
    resolved: ResolvedRecipe, family: str, config: Mapping[str, Any], batch: dict[str, Any], seq_len: int
) -> dict[str, Any]:
    """Return a recipe that keeps everything that may matter in a layout as it was written."""
    recipe, given = resolved.recipe, resolved.given
    kept: dict[str, Any] = {section: given[section] for section in ("parallel", "optimizer", "tuning") if section in given}
    policy = {key: value for key, value in given.get("deepspeed", {}).items() if key != "aio"}
    return {
        **kept,
        "run": {"name": "verify", "seed": recipe.run.seed, "deterministic": recipe.run.deterministic},
        "model": {"family": family, "config": dict(config)},
        "data": {
            "seq_len": seq_len,
            "isolate_documents": recipe.data.isolate_documents,
            **_new_tokens(recipe, config["vocab_size"]),
            **_task(recipe, given),
        },
        "batch": batch,
        "zero": _in_memory(given.get("zero", {})),
        "deepspeed": policy,
        "train": {
            "steps": _steps(recipe),  # the budget of ranks is shared out over them
            "clip_norm": recipe.train.clip_norm,
            "recompute": recipe.train.recompute,
        },
    }


def _steps(recipe: Recipe) -> int:
    """Return the steps of the recipe. No data is read here, so epochs are as many as a budget of
    ranks may need."""
    budget = recipe.tuning.budget
    return recipe.train.steps or Train().total_steps + budget.warmup_steps + budget.final_steps


def _new_tokens(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """Return the new tokens that are trained beside a frozen model, as many as fit beyond the
    symbols of the tokenizer "bytes"."""
    room = vocab_size - SMALLEST_BPE - (TASKS[recipe.data.task].target == "masked")
    tokens = recipe.data.new_tokens[: max(0, room)] if recipe.tuning.method else []
    return {"new_tokens": tokens} if tokens else {}


def _task(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a task with a network or head of its own. Its sources are kept although
    nothing is read from them."""
    name, task = recipe.data.task, TASKS[recipe.data.task]
    if not task.has_own_network:
        return {}
    kept: dict[str, Any] = {"task": name}
    if task.rows:
        kept["sources"] = given.get("data", {}).get("sources")
    if task.learns_classes:
        kept["classes"] = recipe.data.classes or list(task.outputs)
    return kept


def _in_memory(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Return NVMe offload as CPU offload: the same division, without a drive."""
    on_nvme = {"pipeline_read", "pipeline_write", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"}
    return {
        key: {**{k: v for k, v in value.items() if k not in on_nvme}, "device": "cpu"}
        if isinstance(value, dict) and value.get("device") == "nvme"
        else value
        for key, value in zero.items()
    }


def _other_changes(resolved: ResolvedRecipe) -> Iterator[str]:
    recipe = resolved.recipe
    if recipe.train.epochs is not None:
        yield f"train.epochs {recipe.train.epochs:g} → train.steps {_steps(recipe)}, because no data is read"
    if (dtype := recipe.precision.dtype) != "fp32":
        yield f"precision.dtype {dtype or BY_DEVICE} → fp32: rounding to {dtype or 'bf16'} would hide small mistakes"
    if recipe.precision.matmul != "exact":
        yield f"precision.matmul {recipe.precision.matmul} → exact"
    if "nvme" in (recipe.zero.offload_optimizer.device, recipe.zero.offload_param.device):
        yield "offload to nvme → cpu"
    if recipe.model.from_pretrained is not None:
        yield "weights drawn from run.seed instead of read from model.from_pretrained"


def _own_config(resolved: ResolvedRecipe) -> dict[str, Any]:
    return {key: value for key, value in (resolved.hf_config or {}).items() if key not in NOT_MODEL}


def _scaled_config(resolved: ResolvedRecipe, own: TransformerConfig, layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return the family's config in Hugging Face's names with the twin's sizes."""
    family = FAMILIES[own.family]
    sizes = _sizes(resolved, own, layouts)
    written = {name: sizes[rule.fields[0]] for name, rule in family.keys.items() if rule.fields[0] in sizes}
    written |= {name: written[of] for name, of in family.equal.items() if of in written}
    config = _own_config(resolved)
    shadowed = [alias for alias, of in {**family.aliases, **family.echoes}.items() if of in written]
    config = {key: value for key, value in config.items() if key not in shadowed}
    if "head_dim" in written and config.get("head_dim") is None and family.keys["head_dim"].default is None:
        del written["head_dim"]  # it follows from the others, as in the recipe
    return {**config, **written}


def _sizes(resolved: ResolvedRecipe, own: TransformerConfig, layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return the twin's sizes by our field; window keys by their Hugging Face names, which are
    their fields' names too."""
    tensor = [layout.tp for layout in layouts]
    kv_heads = least_key_value_heads(own.num_heads, own.num_kv_heads, tensor)
    heads = own.num_heads // own.num_kv_heads * kv_heads
    tied_head_dim = own.head_dim == own.hidden_size // own.num_heads
    # Each tensor rank must have whole blocks of quantized weights, so a head is one block.
    head_dim, block, beside = (QUANTIZED_TOGETHER,) * 3 if resolved.recipe.tuning.quantize else (HEAD_DIM, 1, 4)
    hidden = heads * (head_dim if tied_head_dim else head_dim + beside)
    stages = max(layout.pp for layout in layouts) * resolved.recipe.parallel.virtual_stages
    layers = min(own.num_layers, max(LEAST_LAYERS, stages))
    encoder_layers = min(own.encoder_layers, max(1, layers // 2))  # of all
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_layers": layers,
        "encoder_layers": encoder_layers,
        "decoder_layers": layers - encoder_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_size": _multiple(math.lcm(*tensor) * block, hidden * 3 // 2),
    }
    if own.positions == "learned":
        sizes["max_positions"] = _seq_len(layouts) + 3  # some are never used
    if any(window is not None for window in own.windows):
        sizes["sliding_window"] = WINDOW
        sizes["layer_types"] = _layer_types(own.windows, layers)
    return sizes


def least_key_value_heads(num_heads: int, num_kv_heads: int, tensor: Sequence[int]) -> int:
    """Return the fewest key/value heads that keep the ratio of query to key/value heads, and that
    each tensor degree divides or shares in the same way as the network's own.

    The network's own number always qualifies, so there is an answer.
    """
    ratio = num_heads // num_kv_heads

    def fits(kv_heads: int, degree: int) -> bool:
        same_way = ratio == 1 or (kv_heads >= degree) == (num_kv_heads >= degree)
        divides = kv_heads % degree == 0 or (ratio > 1 and degree % kv_heads == 0)
        return same_way and divides and ratio * kv_heads % degree == 0

    # More than one if the network has more, to show if they change places.
    fewest = min(2, num_kv_heads)
    return next(n for n in range(fewest, num_kv_heads + 1) if all(fits(n, degree) for degree in tensor))


def _layer_types(windows: Sequence[int | None], layers: int) -> list[str]:
    """Return the types of evenly chosen layers, the first and the last among them; both types if
    the network has both."""
    taken = [windows[round(i * (len(windows) - 1) / max(1, layers - 1))] is not None for i in range(layers)]
    slides = [window is not None for window in windows]
    if layers > 1 and len(set(taken)) < len(set(slides)):
        taken[-1] = not taken[0]
    return ["sliding_attention" if sliding else "full_attention" for sliding in taken]


def _seq_len(layouts: Sequence[Layout]) -> int:
    """Return the tokens of a row, which sequence parallelism divides."""
    return _multiple(math.lcm(*(layout.tp for layout in layouts)), LEAST_TOKENS)


def _batch(resolved: ResolvedRecipe, layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return a batch of several micro-batches in every layout, as many as a schedule may require:
    twice the pipeline's ranks."""
    micro = min(2, resolved.recipe.batch.micro_sequences)
    replicas = math.lcm(*(layout.dp for layout in layouts))
    rounds = 2 * math.lcm(*(layout.pp for layout in layouts))
    return {"global_sequences": micro * replicas * rounds, "micro_sequences": micro}


def _multiple(of: int, least: int) -> int:
    return -(-least // of) * of
