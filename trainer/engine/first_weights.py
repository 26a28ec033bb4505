"""The network that a run trains, and the source of its first weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from parallel.params import ShardSpec, initialise
from trainer.data.tokenizer import Tokenizer
from trainer.model.auto import open_auto
from trainer.model.auto_rules import AUTO
from trainer.model.config import TransformerConfig
from trainer.model.families import FAMILIES
from trainer.model.hf_config import classes_of
from trainer.model.hugging_face import PretrainedWeights, local_folder, read_config
from trainer.model.names import names_of
from trainer.model.network import Network
from trainer.model.new_tokens import require_rows
from trainer.model.transformer import logical_specs
from trainer.recipe import ResolvedRecipe


def first_weights(
    resolved: ResolvedRecipe, tokenizer: Tokenizer, classes: Sequence[str], *, resumed: bool
) -> tuple[Network, Callable[[nn.Module], None]]:
    """Return the network and a function that fills its blocks: from the seed or a Hugging Face
    folder, or with zeros where a checkpoint will give all values."""
    recipe = resolved.recipe
    if recipe.model.family == AUTO:
        return open_auto(recipe, tokenizer)
    new_tokens = tokenizer.ids_of(recipe.data.new_tokens).values()
    network_of = partial(resolved.network, vocab_size=tokenizer.vocab_size, new_tokens=new_tokens, classes=classes)
    if recipe.model.from_pretrained is None:
        network = network_of()
        return network, _zeros if resumed else lambda block: initialise(block, recipe.run.seed)
    folder = local_folder(recipe.model.from_pretrained, recipe.model.revision)
    config = read_config(folder)
    require_rows(folder, config.get("vocab_size"), tokenizer, recipe.data.new_tokens)
    network = network_of(pretrained=config)
    if resumed:
        return network, _zeros
    weights = PretrainedWeights(folder, grown=(config.get("vocab_size"), network.vocab_size))
    names, specs = names_of(network), logical_specs(network)
    drawn = _drawn(weights, folder, network, specs)
    ties = {} if network.classes else names.ties(specs)
    weights.check_names(specs, ties=ties, is_unused=partial(names.is_for_other_heads, network))

    def fill(block: nn.Module) -> None:
        weights.fill(block, drawn=drawn)
        initialise(block, recipe.run.seed, only=drawn)

    return network, fill


def _drawn(
    weights: PretrainedWeights, folder: Path, network: TransformerConfig, specs: Sequence[ShardSpec]
) -> Callable[[ShardSpec], bool]:
    """Return a function that says whether a parameter must be drawn, because the folder does not
    give it.

    Drawn are the parameters added for tuning, and the head of a classifier unless the folder has
    one for the same classes.
    """
    names = names_of(network)
    head = [spec for spec in specs if any(names.is_of_classes(piece.name) for piece in spec.pieces)]
    has_head = weights.holds(head) and classes_of(FAMILIES[network.family], read_config(folder)) == network.classes
    drawn = set() if has_head else {piece.name for spec in head for piece in spec.pieces}
    return lambda spec: spec.added or any(piece.name in drawn for piece in spec.pieces)


@torch.no_grad()
def _zeros(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.zero_()
