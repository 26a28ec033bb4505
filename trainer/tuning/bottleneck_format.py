"""Bottleneck adapters as a folder: bottleneck_config.json and bottleneck.safetensors, and the
function that adds them to a model of transformers. peft has no such adapters.

The config names the modules whose output an adapter changes ("modules"), the number of its inner
features ("bottleneck") and the function between its two projections ("activation"). The tensors of
a module are those of two linear layers in it, `adapter_down` and `adapter_up`, under their names in
a state dict: "model.layers.0.self_attn.o_proj.adapter_down.weight".

Where the recipe has new tokens, the config also has the number of rows of the vocabulary that the
model must have ("vocab_size"), the ids of the tokens ("tokens"), and for each matrix that gets
their rows the name of the tensor with these rows in the same order ("token_rows").
"""

from __future__ import annotations

from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic reads typing's own from Python 3.12 on
)

from pydantic import Field, with_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import TypedDict

from trainer.errors import DataError
from trainer.files.decoding import OPEN, read_as
from trainer.files.paths import as_loaded
from trainer.files.reading import require_regular, told
from trainer.model.config import TransformerConfig
from trainer.model.network import Network
from trainer.schema import Recipe
from trainer.tuning.targets import targeted_modules, token_rows

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck.safetensors"
Size = Annotated[int, Field(ge=1)]


@with_config(OPEN)
class _Config(TypedDict):
    """The keys of bottleneck_config.json that are read."""

    modules: list[str]
    bottleneck: Size
    vocab_size: NotRequired[Size]
    tokens: NotRequired[list[Annotated[int, Field(ge=0)]]]
    token_rows: NotRequired[dict[str, str]]


def bottleneck_config(recipe: Recipe, network: Network) -> dict[str, Any]:
    """Return the contents of bottleneck_config.json."""
    assert isinstance(network, TransformerConfig), "family auto has no tuning"
    return {
        "base_model_name_or_path": as_loaded(recipe.model.from_pretrained),
        "revision": recipe.model.revision,
        "bottleneck": recipe.tuning.bottleneck,
        "activation": "gelu",
        "modules": targeted_modules(recipe.tuning, network),
        **_token_keys(recipe, network),
    }


def _token_keys(recipe: Recipe, network: TransformerConfig) -> dict[str, Any]:
    rows = token_rows(recipe.tuning, network)
    keys = {"vocab_size": network.vocab_size, "tokens": list(network.new_tokens), "token_rows": rows}
    return keys if rows else {}


def load_bottlenecks(model: nn.Module, folder: Path | str) -> nn.Module:
    """Add a folder's adapters to a model of transformers, and return it. From then on they are
    moved, run and saved with it.

    From now on they move, run and are saved with it. DataError if the folder's adapters are not
    this model's.
    """
    folder = Path(folder)
    try:
        config = read_as(_Config, folder / CONFIG)
        require_regular(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: its adapters cannot be read ({told(error)}): export them again") from error
    try:
        _put_behind(model, config, tensors)
    except (AttributeError, KeyError, IndexError, RuntimeError) as error:
        # no such module, tensor or row; another shape
        raise DataError(f"{folder}: its adapters are not for this model ({error}): give their own") from error
    return model


def _put_behind(model: Any, config: _Config, tensors: dict[str, Tensor]) -> None:
    if "tokens" in config:
        _set_rows(model, config, tensors)
    for name in config["modules"]:
        projection = model.get_submodule(name)
        like = next(projection.parameters())
        features = tensors[f"{name}.adapter_up.bias"].numel()
        projection.adapter_down = nn.Linear(features, config["bottleneck"], dtype=like.dtype, device=like.device)
        projection.adapter_up = nn.Linear(config["bottleneck"], features, dtype=like.dtype, device=like.device)
        projection.register_forward_hook(_through_adapter)
    if unexpected := model.load_state_dict(tensors, strict=False).unexpected_keys:
        raise KeyError(f"tensor {unexpected[0]} belongs to none of its modules")


def _set_rows(model: Any, config: _Config, tensors: dict[str, Tensor]) -> None:
    """Set the rows of new tokens, and grow the model's vocabulary if it is too small."""
    if model.get_input_embeddings().weight.shape[0] < config["vocab_size"]:
        model.resize_token_embeddings(config["vocab_size"])
    for weight, rows in config["token_rows"].items():
        matrix = model.get_parameter(weight).data
        matrix[config["tokens"]] = tensors.pop(rows).to(matrix)


def _through_adapter(projection: Any, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    changed: Tensor = y + projection.adapter_up(functional.gelu(projection.adapter_down(y)))
    return changed
