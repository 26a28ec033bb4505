"""Family "auto": a model that transformers builds, with its config and its first weights.

The first weights come from one of three sources. Each needs this much fp32 on a rank at a time,
besides the share that ZeRO leaves it:

* a folder whose tensors have the model's own names (nearly all do): one layer, read box by box;
* a folder whose tensors transformers must convert (such as Mixtral's experts, one by one): the
  whole model, in host memory;
* from scratch: the whole model, in host memory. transformers draws it from one stream of the run's
  seed, so it depends on neither layout nor device.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from parallel.params import Role
from parallel.rng import derive_seed
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, RecipeError, UserError
from trainer.files.locks import Lock
from trainer.model.auto_network import AutoNetwork
from trainer.model.auto_rules import folder_findings, layer_findings, size_findings
from trainer.model.auto_stage import Contents, contents_of
from trainer.model.hugging_face import PretrainedWeights, local_folder, read_config
from trainer.model.new_tokens import require_rows
from trainer.schema import Finding, Recipe
from trainer.spelling import nearest
from trainer.tasks import TASKS

Fill = Callable[[nn.Module], None]


def open_auto(recipe: Recipe, tokenizer: Tokenizer) -> tuple[AutoNetwork, Fill]:
    """Return the recipe's model, and a function that gives its blocks their first weights.

    RecipeError or DataError, in one line each, for a model that transformers does not have, does
    not know or cannot load.
    """
    model, folder = recipe.model, None
    if model.from_pretrained is not None:
        folder = local_folder(model.from_pretrained, model.revision, code=model.trust_remote_code)
        _refuse(folder_findings(recipe, read_config(folder)))
    maker = _Maker(recipe, folder)
    config = maker.config(tokenizer)
    maker.grow(config, tokenizer)
    _refuse(_config_findings(recipe, config, tokenizer))
    skeleton = maker.on_meta(config)
    contents = contents_of(skeleton)
    _refuse(_model_findings(recipe, skeleton, contents))
    build, fill = maker.first_weights(config, skeleton, contents)
    text = _text_config(config)
    network = AutoNetwork(
        hf_config=config,
        architecture=type(skeleton).__name__,
        build=build,
        vocab_size=text.vocab_size,
        matmul_weights=_matmul_weights(skeleton, contents, text),
        attention_width=_attention_width(text),
        largest_weight=max(parameter.numel() for parameter in skeleton.parameters()),
        code=folder if model.trust_remote_code else None,
    )
    return network, fill


class _Maker:
    """The config and the model as transformers makes them. Only here may code that came with a
    folder run."""

    def __init__(self, recipe: Recipe, folder: Path | None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.auto_class = TASKS[recipe.data.task].auto_class
        # rows of the folder's embedding, and of the model's
        self.grown: tuple[int, int] | None = None

    def config(self, tokenizer: Tokenizer) -> Any:
        from transformers import AutoConfig

        # a copy, because transformers writes into it
        given = copy.deepcopy(self.recipe.model.config)
        with self._transformers():
            if self.folder is not None:
                trusted = self.recipe.model.trust_remote_code
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trusted)
                _override(config, given)
            else:
                # Without a padding token: torch would not train its embedding, and in our data it
                # is a token like any other.
                end = tokenizer.end_of_document
                begin = end if tokenizer.bos is None else tokenizer.bos
                special = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
                keys = {"vocab_size": tokenizer.vocab_size, **special, **given}
                config = AutoConfig.for_model(**keys)
                _refuse_unknown(config, given)
        # The next token must be hidden from the tokens before it; BERT and similar models hide it
        # only as decoders.
        if getattr(config, "is_decoder", None) is False:
            config.is_decoder = True
        return config

    def grow(self, config: Any, tokenizer: Tokenizer) -> None:
        """Give a folder's embedding and head rows for new tokens. RecipeError for symbols that the
        recipe does not name."""
        text = _text_config(config)
        rows = getattr(text, "vocab_size", None)
        if self.folder is None or not isinstance(rows, int) or tokenizer.vocab_size <= rows:
            return
        require_rows(self.folder, rows, tokenizer, self.recipe.data.new_tokens)
        self.grown = (rows, tokenizer.vocab_size)
        text.vocab_size = tokenizer.vocab_size

    def on_meta(self, config: Any) -> Any:
        """Return the model without storage for its parameters. Its buffers (rotary frequencies,
        slopes) have their values."""
        with _parameters_on_meta():
            return self._model(config)

    def first_weights(self, config: Any, skeleton: Any, contents: Contents) -> tuple[Callable[[], Any], Fill]:
        """Return a function that makes the model, and one that fills its blocks."""
        if self.folder is None:
            return partial(self._drawn, config), _filled_already
        weights = PretrainedWeights(self.folder, grown=self.grown)
        specs = [*contents.parameters.values(), *contents.constants.values()]
        if not weights.holds(specs):
            return partial(self._converted, config), _filled_already
        unused = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
        weights.check_names(specs, ties=contents.ties, is_unused=lambda name: any(p.search(name) for p in unused))
        return partial(self._to_fill, config, weights), weights.fill

    def _model(self, config: Any) -> Any:
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        with self._transformers():
            return auto_class.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=self.recipe.model.trust_remote_code
            )

    def _drawn(self, config: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.recipe.run.seed, "weights"))
            return self._model(config)

    def _to_fill(self, config: Any, weights: PretrainedWeights) -> Any:
        model = self.on_meta(config)
        for name, spec in contents_of(model).constants.items():
            model.get_buffer(name).copy_(weights.read(spec.pieces[0]))
        return model

    def _converted(self, config: Any) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # every rank would show one
        config = copy.deepcopy(config)
        if self.grown is not None:
            _text_config(config).vocab_size = self.grown[0]
        with self._transformers():
            model, loading = getattr(transformers, self.auto_class).from_pretrained(
                self.folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=self.recipe.model.trust_remote_code,
                output_loading_info=True,
            )
        for kind, names in loading.items():
            if names:
                first = next(iter(sorted(map(str, names))))
                raise DataError(f"{self.folder}: {kind.replace('_', ' ')}: {first}: config.json and the weights do not match")
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DataError(f"{self.folder}: tensor {name} holds NaN or infinity: fetch the folder again")
        if self.grown is not None:
            _grow_by_means(model, *self.grown)
        return model

    @contextmanager
    def _transformers(self) -> Iterator[None]:
        """Turn errors of transformers into a RecipeError of one line.

        Where a folder's code is trusted, one rank at a time may enter: transformers copies the code
        into its cache, from which the other ranks of this node import it.
        """
        subject = self.folder or f"model.config (model_type {self.recipe.model.config.get('model_type')})"
        with ExitStack() as stack:
            if self.recipe.model.trust_remote_code:
                from transformers.utils.hub import HF_MODULES_CACHE

                Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
                stack.enter_context(Lock(Path(HF_MODULES_CACHE) / "triaxis.lock").held())
            try:
                yield
            except UserError:
                raise
            except Exception as error:
                # config classes, model classes and a folder's own code raise errors of any class
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = " ".join(lines)[:300] or type(error).__name__
                raise RecipeError(f"{subject}: transformers cannot make a {self.auto_class} of it: {reason}") from error


@torch.no_grad()
def _grow_by_means(model: Any, rows: int, wanted: int) -> None:
    """Add rows that are means of the others, as `PretrainedWeights` does: transformers would add
    noise, different on every rank."""
    model.resize_token_embeddings(wanted, mean_resizing=False)
    for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        for weight in module.parameters(recurse=False):
            weight[rows:] = weight[:rows].double().mean(0)


def _filled_already(block: nn.Module) -> None:
    """Do nothing: the model was built with its first weights."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Remove the storage of parameters as they are registered, so that a model of any size is built
    in the memory of its largest parameter."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    # the result of the hook is registered
    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _refuse(findings: Iterator[Finding]) -> None:
    if lines := [finding.message for finding in findings]:
        raise RecipeError(lines)


def _override(config: Any, given: dict[str, Any]) -> None:
    for key, value in given.items():
        if not hasattr(config, key):
            raise RecipeError(_unknown_key(config, key))
        setattr(config, key, value)


def _refuse_unknown(config: Any, given: dict[str, Any]) -> None:
    """Raise RecipeError for keys that transformers would store without using, or drop, without a
    message.

    It stores a key that its config class does not have, and drops one of text generation.
    """
    from transformers import GenerationConfig

    known = {*_known_keys(config), "model_type"}
    ignored = vars(config).keys() | GenerationConfig().to_dict().keys()
    if wrong := [key for key in given if key not in known and key in ignored]:
        raise RecipeError([_unknown_key(config, key) for key in wrong])


def _known_keys(config: Any) -> set[str]:
    return {*(field.name for field in dataclasses.fields(config)), *config.attribute_map}


def _unknown_key(config: Any, key: str) -> str:
    meant = nearest(key, _known_keys(config))
    return f"model.config.{key}: {type(config).__name__} has no such key" + (f"; did you mean {meant}?" if meant else "")


def _text_config(config: Any) -> Any:
    """Return the part of a config that describes the model of tokens: all of it, unless the model
    also takes images or sound."""
    return config.get_text_config(decoder=True)


def _config_findings(recipe: Recipe, config: Any, tokenizer: Tokenizer) -> Iterator[Finding]:
    yield from layer_findings(config.to_dict())
    text = _text_config(config)
    if not isinstance(getattr(text, "vocab_size", None), int):
        yield Finding((), f"{type(config).__name__} has no vocab_size: not a model of tokens")
    positions = getattr(text, "max_position_embeddings", None)
    yield from size_findings(recipe, getattr(text, "vocab_size", None), positions, tokenizer.vocab_size)
    for key in ("layerdrop", "decoder_layerdrop"):
        if getattr(text, key, 0):
            yield Finding(
                (), f"{key} = {getattr(text, key)}: ranks would drop different layers and wait for each other; legal: 0"
            )
    if getattr(text, "output_router_logits", False):
        yield Finding((), "output_router_logits = true: the router's auxiliary loss is not trained here; legal: false")


def _model_findings(recipe: Recipe, model: Any, contents: Contents) -> Iterator[Finding]:
    kind = type(model).__name__
    if recipe.train.recompute == "full" and not model.supports_gradient_checkpointing:
        yield Finding((), f'train.recompute = "full": {kind} cannot recompute its layers; legal: "none"')
    for name, spec in contents.constants.items():
        if not model.get_buffer(name).is_floating_point():
            yield Finding((), f"{kind}: {spec.pieces[0].name} holds whole numbers, which are not loaded and saved here")


def _matmul_weights(model: Any, contents: Contents, text: Any) -> int:
    """Return the number of elements that a token is multiplied with. They are the matrices, with
    only those experts that a token is sent to, and an embedding only where it is also the head."""
    parameters = dict(model.named_parameters())
    chosen = getattr(text, "num_experts_per_tok", None)
    total = 0
    for name, spec in contents.parameters.items():
        if spec.role is Role.MATRIX:
            experts = parameters[name].shape[0] if parameters[name].dim() == 3 and chosen else 1
            total += parameters[name].numel() * min(chosen or 1, experts) // experts
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        total += head.weight.numel()
    return total


def _attention_width(text: Any) -> int:
    """Return Σ over the attention layers of heads · head size; 0 where the config does not say."""
    layers, heads, hidden = (getattr(text, key, None) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return 0
    if kinds := getattr(text, "layer_types", None):
        layers = sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)
    head_dim: int = getattr(text, "head_dim", None) or hidden // heads
    return layers * heads * head_dim
