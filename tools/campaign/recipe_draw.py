"""Recipes drawn at random from the schema itself: a key that joins `trainer.schema` is drawn
without a change here.

A recipe begins with what every one needs (a task, its data, a small network) and grows section by
section: some of a section's keys are drawn from their types and ranges, often at the ends of the
range, and what `check` refuses is removed again, first together, then key by key. So every recipe
is one that `check` accepts, and all of it was drawn.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel.schedules import SCHEDULES
from tools.campaign.recipe_supplies import Supplies
from trainer.commands.network import known_network
from trainer.commands.ranks import divide
from trainer.errors import UserError
from trainer.model.families import FAMILIES, Family
from trainer.model.hf_keys import ACTIVATIONS, GATED, LAYER_TYPES, Key
from trainer.recipe import ResolvedRecipe, json_schema, load

WORLD_SIZES = (1, 2, 4)
NO_LIMIT = 2**62  # drawn as the largest value of a number without a limit
WORDS = ("a", "is odd", "<new>", "Zahl größer", "times")

# To keep runs small, only these values of these keys are drawn.
SMALL: Mapping[str, Sequence[Any]] = {
    "run.name": ("a", "run-1", "x" * 100),
    "run.dir": ("runs", "deep/er"),
    "data.cache_dir": ("cache",),
    "data.seq_len": (1, 2, 7, 8, 16, 31, 32),
    "data.tokenizer": ("bytes", "bpe:257", "bpe:300"),
    "data.workers": (0, 1, 2),
    "data.sources[].weight": (1e-300, 0.5, 1.0, 3.0, 1e300),
    "data.sources[].field": ("text", "question"),
    "data.eval_sources[].field": ("question",),
    "data.sources[].fields": ({"prompt": "question"}, {"source": "en", "target": "de"}, {"text": "question"}),
    "data.eval_sources[].fields": ({"prompt": "question"}, {"source": "en", "target": "de"}, {"text": "question"}),
    "data.classes": (["0", "1", "2"], ["0", "1", "2", "3"]),
    "parallel.tensor": (1, 2, 4),
    "parallel.pipeline": (1, 2, 4),
    "parallel.context": (1,),
    "parallel.virtual_stages": (1, 2),
    "parallel.balance": ([1, 1], [1, 2], [2, 1], [1, 1, 1, 1]),
    "parallel.schedule": (*SCHEDULES,),
    "batch.global_sequences": (1, 2, 3, 4, 6, 8, 12),
    "batch.micro_sequences": (1, 2, 3),
    "zero.offload_optimizer.nvme_path": ("nvme",),
    "zero.offload_param.nvme_path": ("nvme", "nvme2"),
    # Buffers are allocated as large as the recipe says.
    "zero.offload_param.buffer_size": (4096, 20_000, 100_000),
    "zero.offload_optimizer.buffer_count": (4, 8, 9),
    "zero.offload_param.buffer_count": (1, 5, 20, 50),
    # lion is compiled at its first start, which takes minutes.
    "optimizer.name": ("adamw", "adam", "sgd", "adafactor"),
    # It collects garbage twice in each forward: a minute for a sample.
    "deepspeed.memory_breakdown": (False,),
    "train.steps": (1, 2),
    "train.eval_translations": (0, 1, 3),
    "train.beams": (1, 2, 4),
    "checkpoint.best": ("eval_loss", "eval_accuracy", "eval_rewards/margins", "eval_f1", "eval_chrf"),
    "tuning.rank": (1, 2, 8, 40),
    "tuning.bottleneck": (1, 8, 64),
    "preference.beta": (1e-6, 0.1, 10.0),
    "guard.timeout_s": (60, 1_000_000),  # a shorter one may end a run on a busy machine
    "guard.long_timeout_s": (60, 1_000_000),
    "tracking.wandb.mode": (*["disabled"] * 20, "offline"),
}
# Keys that are often written, because much depends on them.
OFTEN = {
    **{"parallel.tensor": 0.4, "parallel.pipeline": 0.5, "parallel.schedule": 0.7, "parallel.virtual_stages": 0.4},
    **{"zero.stage": 0.8, "tuning.method": 0.5, "precision.dtype": 0.7, "optimizer.name": 0.7, "batch.global_sequences": 0.8},
    **{"zero.offload_optimizer.device": 0.6, "zero.offload_param.device": 0.6, "tuning.quantize": 0.3},
    **{"zero.offload_optimizer.nvme_path": 0.5, "zero.offload_param.nvme_path": 0.5, "data.seq_len": 0.05},
    # A source's kind was decided when it was chosen.
    **dict.fromkeys(("data.task", "from_pretrained", "path", "target_path", "columns", "shape"), 0.0),
    **{
        "data.sources[].fields": 0.2,
        "data.eval_sources[].fields": 0.2,
        "tracking.tensorboard": 0.1,
        "zero.offload_param.buffer_size": 0.1,
    },
}
WRITTEN, WRITTEN_ENUM = 0.15, 0.35  # the probabilities of other keys
AT_THE_END = 0.3  # the probability that a number is at an end of its range

# Networks of transformers that no family here has, besides one that has.
AUTO: tuple[Mapping[str, Any], ...] = (
    {"model_type": "bloom", "hidden_size": 16, "n_layer": 2, "n_head": 2},
    {"model_type": "gpt_neox", **dict.fromkeys(("hidden_size", "intermediate_size"), 16), "num_hidden_layers": 2,
     "num_attention_heads": 2, "max_position_embeddings": 64},
    {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
     "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
     "max_position_embeddings": 64},
    {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
     "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 64},
)  # fmt: skip

OFFLOADS: tuple[Mapping[str, Any], ...] = (
    {"device": "none"},
    {"device": "cpu"},
    {"device": "nvme", "nvme_path": "nvme"},
)

# A family's own keys are drawn by our names for sizes; for others any value of POOL that its table
# accepts.
LAYERS = (1, 2, 3, 4)
POOL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 4, 8, 32, 64, 0.0, 1e-12, 1e-5, 0.02, 0.1, 0.5, 1.0, 2.5, 30.0),
    *ACTIVATIONS,
    "gated-gelu",
    f"{GATED}silu",
    *([kind] * layers for kind in LAYER_TYPES for layers in LAYERS),
)
ROPES: tuple[Mapping[str, Any], ...] = (
    {"rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 16}},
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A recipe that `check` accepts, its world size, and how many candidates `check` was asked
    about."""

    recipe: dict[str, Any]
    world_size: int
    asked: int
    accepted: int


@dataclass
class _Growing:
    """A recipe in the making."""

    stream: random.Random
    supplies: Supplies
    recipe: dict[str, Any] = field(default_factory=dict)
    asked: int = 0
    accepted: int = 0

    def check(self, recipe: Mapping[str, Any]) -> ResolvedRecipe | None:
        """Return the recipe as `check` resolves it, None if it refuses."""
        path = self.supplies.folder / "candidate.json"
        path.write_text(json.dumps(recipe))
        self.asked += 1
        try:
            resolved = load(path)
        except UserError:
            return None
        self.accepted += 1
        return resolved

    def take(self, part: Mapping[str, Any]) -> bool:
        """Lay a part over the recipe if `check` accepts the whole."""
        candidate = copy.deepcopy(self.recipe)
        _lay(candidate, part)
        if self.check(candidate) is None:
            return False
        self.recipe = candidate
        return True


def draw(seed: int, number: int, supplies: Supplies) -> Drawn:
    """Draw case `number` of a campaign. Paths that it writes to are relative to the folder in which
    it is started."""
    growing = _Growing(random.Random(f"recipes {seed} {number}"), supplies)
    while True:
        growing.recipe = _beginning(growing)
        for part in _features(growing.stream):
            growing.take(part)
        _grow(growing)
        if world_sizes := _world_sizes(growing):
            return Drawn(growing.recipe, growing.stream.choice(world_sizes), growing.asked, growing.accepted)


def _world_sizes(growing: _Growing) -> list[int]:
    """Return those world sizes that `check --world-size` accepts."""
    resolved = growing.check(growing.recipe)
    assert resolved is not None
    found = []
    for world_size in WORLD_SIZES:
        try:
            divide(resolved.recipe, known_network(resolved), world_size, "--world-size")
        except UserError:
            continue
        found.append(world_size)
    return found


def _grow(growing: _Growing) -> None:
    sections = list(_sections(json_schema(), growing.recipe))
    growing.stream.shuffle(sections)
    for path, properties in sections:
        part = {
            name: _value(dotted, node, growing.stream)
            for name, node in properties.items()
            if growing.stream.random() < _how_often(dotted := _dotted((*path, name)), node)
        }
        if part and not growing.take(_at(path, part)):
            for name, value in growing.stream.sample(list(part.items()), len(part)):
                growing.take(_at(path, {name: value}))


def drawn_keys() -> set[str]:
    """Return every key that a recipe with one source of each kind may get, items of lists as []."""
    one_of_each = {"data": {"sources": [{}], "eval_sources": [{}]}}
    return {
        dotted
        for path, properties in _sections(json_schema(), one_of_each)
        for name, node in properties.items()
        if _how_often(dotted := _dotted((*path, name)), node)
    }


# The beginning of every recipe.


def _beginning(growing: _Growing) -> dict[str, Any]:
    """Return a task and its data, a network that learns it, and mostly a layout, an offload or a
    way of tuning."""
    stream, supplies = growing.stream, growing.supplies
    task = stream.choice(("pretrain", "pretrain", "sft", "preference", "translate", "classify", "mlm"))
    sources = supplies.sources(task)
    data: dict[str, Any] = {
        "task": task,
        "seq_len": stream.choice((16, 32)) if task in ("pretrain", "mlm") else 64,
        "sources": stream.sample(sources, stream.choice((1, 1, 2))),
    }
    if stream.random() < 0.3:
        data["eval_sources"] = [stream.choice(sources)]
    micro, rounds = stream.choice((1, 2)), stream.choice((1, 2, 4))
    recipe = {
        "data": data,
        "batch": {"micro_sequences": micro, "global_sequences": 4 * micro * rounds},
        "train": {"steps": stream.choice((1, 2)), "eval_sequences": 4},
    }
    while growing.check(recipe := {**recipe, "model": _model(stream, supplies, task)}) is None:
        pass
    return recipe


def _features(stream: random.Random) -> Iterator[dict[str, Any]]:
    """Yield combinations that key by key hardly ever come together."""
    tensor, pipeline = stream.choice(((1, 1), (1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)))
    if tensor > 1:
        yield {"parallel": {"tensor": tensor}}
    if pipeline > 1:
        yield {"parallel": {"pipeline": pipeline}}
        schedule = stream.choice((*SCHEDULES,))
        yield {
            "parallel": {
                "pipeline": pipeline,
                "schedule": schedule,
                "virtual_stages": 2 if "1f1b" != schedule != "gpipe" else 1,
            }
        }
    states, weights = stream.choice(OFFLOADS), stream.choice(OFFLOADS)
    if stream.random() < 0.5:
        yield {"zero": {"stage": 3, "offload_optimizer": states, "offload_param": weights}}
    yield {"zero": {"stage": stream.choice((0, 1, 2, 3))}}
    if stream.random() < 0.4:
        quantized = {"quantize": stream.choice(("nf4", "int8"))} if stream.random() < 0.5 else {}
        yield {"tuning": {"method": stream.choice(("lora", "dora", "adalora", "ia3", "adapter")), **quantized}}


def _model(stream: random.Random, supplies: Supplies, task: str) -> dict[str, Any]:
    family = stream.choice((*FAMILIES, "auto"))
    if family == "auto":
        if stream.random() < 0.3:
            return {"family": "auto", "from_pretrained": str(supplies.pretrained["llama"])}
        return {"family": "auto", "config": dict(stream.choice(AUTO))}
    if stream.random() < 0.25:
        return {"from_pretrained": str(supplies.pretrained[family])}
    return {"family": family, "config": _config(stream, FAMILIES[family])}


def _config(stream: random.Random, family: Family) -> dict[str, Any]:
    heads, head_dim, layers = stream.choice((1, 2, 4)), stream.choice((2, 4, 8)), stream.choice(LAYERS)
    wide = stream.random() < 0.2  # quantized weights are held in blocks of 64
    if wide:
        heads, head_dim = 4, 16
    sizes: dict[str, Any] = {
        "hidden_size": heads * head_dim,
        "num_heads": heads,
        "head_dim": head_dim,
        "num_kv_heads": stream.choice([n for n in (1, 2, 4) if heads % n == 0]),
        "ffn_size": 256 if wide else stream.choice((heads, 8, 32, 64)),
        "num_layers": layers,
        "encoder_layers": layers,
        "decoder_layers": stream.choice(LAYERS),
        "max_positions": stream.choice((64, 96)),
    }
    config: dict[str, Any] = {}
    for name, rule in family.keys.items():
        if rule.fields[0] in sizes:
            config[name] = sizes[rule.fields[0]]
        elif name != "vocab_size" and stream.random() < 0.2:
            config[name] = stream.choice([value for value in POOL if _reads(rule, value)])
    if family.rope and stream.random() < 0.3:
        config |= stream.choice(ROPES)
    return config


def _reads(rule: Key, value: Any) -> bool:
    try:
        rule.read(value)
    except ValueError:
        return False
    return True


# The keys and their values, from the schema.


def _sections(schema: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Yield each section with its own keys; of lists of sections, those that the recipe has."""

    def opened(path: tuple[str | int, ...], node: Mapping[str, Any], value: Any) -> Iterator[Any]:
        own = {}
        for name, key in node["properties"].items():
            here, inner = (*path, name), _resolved(schema, key)
            given = value.get(name) if isinstance(value, Mapping) else None
            if _dotted(here) in SMALL:
                own[name] = inner
            elif "properties" in inner:
                yield from opened(here, inner, given)
            elif "$ref" in inner.get("items", {}):
                for index, item in enumerate(given or ()):
                    yield from opened((*here, index), _resolved(schema, inner["items"]), item)
            elif inner.get("type") != "object":
                own[name] = inner
        if own:
            yield path, own

    yield from opened((), {**schema, "properties": {k: v for k, v in schema["properties"].items() if k != "extends"}}, recipe)


def _resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node without references and without null."""
    inner = next((n for n in node.get("anyOf", ()) if n.get("type") != "null"), node)
    if "$ref" in inner:
        inner = schema["$defs"][inner["$ref"].rpartition("/")[2]]
    return {**node, **inner}


def _how_often(dotted: str, node: Mapping[str, Any]) -> float:
    name = dotted.rpartition(".")[2]
    return OFTEN.get(dotted, OFTEN.get(name, WRITTEN_ENUM if "enum" in node or node.get("type") == "boolean" else WRITTEN))


def _value(dotted: str, node: Mapping[str, Any], stream: random.Random) -> Any:
    if dotted in SMALL:
        return copy.deepcopy(stream.choice(SMALL[dotted]))
    if "enum" in node:
        return stream.choice(node["enum"])
    if "const" in node:
        return node["const"]
    match node.get("type"):
        case "boolean":
            return stream.random() < 0.5
        case "integer":
            return _whole(node, stream)
        case "number":
            return _number(node, stream)
        case "array":
            least, most = node.get("minItems", 0), node.get("maxItems", 3)
            return [_value(f"{dotted}[]", node["items"], stream) for _ in range(stream.randint(least, most))]
        case _:
            return stream.choice(WORDS)


def _whole(node: Mapping[str, Any], stream: random.Random) -> int:
    low, high = int(node.get("minimum", -NO_LIMIT)), int(node.get("maximum", NO_LIMIT))
    if stream.random() < AT_THE_END:
        return stream.choice((low, high // node.get("multipleOf", 1) * node.get("multipleOf", 1)))
    usual, step = node.get("default") or max(low, 1), node.get("multipleOf", 1)
    chosen = stream.choice((low, low + step, low + 2 * step, usual, 2 * usual, usual // 2))
    return min(max(chosen, low), high) // step * step


def _number(node: Mapping[str, Any], stream: random.Random) -> float:
    low, high = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum", node.get("exclusiveMaximum"))
    if stream.random() < AT_THE_END:
        least = -1e30 if low is None else low if "minimum" in node else math.nextafter(low + 1e-30, math.inf)
        most = 1e30 if high is None else high if "maximum" in node else high - 1e-7
        return float(stream.choice((least, most)))
    usual = node.get("default") or 1.0
    return float(stream.choice((usual, usual / 2, usual * 2)))


# Places in a recipe.


def _dotted(path: Sequence[str | int]) -> str:
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _at(path: Sequence[str | int], part: Mapping[str, Any]) -> dict[Any, Any]:
    """Return a part of a section as a part of the recipe; items of lists by their numbers."""
    inside: dict[Any, Any] = dict(part)
    for step in reversed(path):
        inside = {step: inside}
    return inside


def _lay(recipe: Any, part: Mapping[Any, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and (isinstance(key, int) or isinstance(recipe.get(key), dict | list)):
            _lay(recipe[key], value)
        else:
            recipe[key] = copy.deepcopy(value)
