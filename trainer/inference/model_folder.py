"""The model that a command line names, in the form in which transformers loads it: a run, a
checkpoint, a Hugging Face folder, or an adapter with the model that it belongs to."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from torch import nn

from trainer.errors import DataError, RecipeError
from trainer.files.reading import read_json, require_regular_below, told
from trainer.inference.weights import Weights
from trainer.model.hugging_face import local_folder
from trainer.model.model_files import CONFIG
from trainer.model.origin import GENERATION_CONFIG
from trainer.tuning import bottleneck_format, peft_format

# The key of an adapter's configuration, peft's and ours, that names the model it belongs to.
BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. `model`: the folder with config.json and the weights. `adapter`: the folder
    of what was trained beside them. `described`: what it is, for a user."""

    model: Path
    adapter: Path | None = None
    described: str = ""

    @property
    def named(self) -> Path:
        """The folder that a message names."""
        return self.adapter or self.model

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer: the adapter's, if one was saved with it."""
        return self._having("tokenizer.json", "tokenizer_config.json")

    @property
    def generation_config(self) -> Path:
        """The file of the settings of generation, which may be missing."""
        return self._having(GENERATION_CONFIG) / GENERATION_CONFIG

    def _having(self, *names: str) -> Path:
        has = self.adapter is not None and any((self.adapter / name).is_file() for name in names)
        return self.adapter if has and self.adapter is not None else self.model


@contextmanager
def opened(name: str, *, base: str | None = None) -> Iterator[ModelFolder]:
    """Find a model, and yield its folder; of a checkpoint, a folder that is gone after the block.

    `base`: the model of an adapter, in place of the one that its configuration names. RecipeError
    where no model is found, DataError where one is damaged.
    """
    path = Path(name)
    if (config := _adapter_config(path)) is not None:
        yield ModelFolder(_base_of(config, base), path, described=str(path))
        return
    if base is not None:
        raise RecipeError(f"--base {base}: {name} is no adapter: leave it out")
    weights = Weights.named(name, option="MODEL")
    if weights.manifest is None:
        yield ModelFolder(weights.folder, described=str(weights.folder))
        return
    from trainer.checkpoint.export import export

    with tempfile.TemporaryDirectory(prefix="triaxis-model-") as scratch:
        folder = export(weights.folder, Path(scratch) / "model", whole=True).folder
        yield ModelFolder(folder, described=f"{weights.folder}, step {weights.step:,}")


def _adapter_config(folder: Path) -> Path | None:
    """Return the configuration of a folder that has an adapter and no model; None of another
    folder."""
    if (folder / CONFIG).is_file():
        return None
    files = (folder / name for name in (peft_format.CONFIG, bottleneck_format.CONFIG))
    return next((file for file in files if file.is_file()), None)


def _base_of(config: Path, given: str | None) -> Path:
    """Return the folder of the model that an adapter belongs to."""
    try:
        said = read_json(config)
    except (OSError, ValueError) as error:
        raise DataError(f"{config}: {told(error)}: fetch or export the adapter again") from None
    name = given if given is not None else said.get(BASE)
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{config} names no {BASE}: give the adapter's model, --base FOLDER")
    if (Path(name) / CONFIG).is_file():
        return Path(name)
    try:
        if given is None and not _is_path(name):
            return local_folder(name, said.get("revision"))
    except RecipeError:  # its line speaks of a recipe
        pass
    where = "--base" if given is not None else f"{BASE} in {config}"
    raise RecipeError(f"{where}: no model at {name!r}: give the adapter's model, --base FOLDER")


def _is_path(name: str) -> bool:
    """Return whether a name can only be a folder, because no model on the hub is named so."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def load(found: ModelFolder) -> tuple[Any, Any]:
    """Return model and tokenizer of transformers: no code from the folder, no pickle, and no tensor
    drawn at random."""
    for folder in filter(None, (found.model, found.adapter)):
        try:
            require_regular_below(folder)
        except OSError as error:
            raise DataError(f"{error.filename}: {told(error)}: remove it from the folder") from None
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    model = _load_model(found.model)
    with _told_in_a_line(found.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(found.tokenizer, trust_remote_code=False)
    if (found.model / bottleneck_format.CONFIG).is_file():
        bottleneck_format.load_bottlenecks(model, found.model)
    if found.adapter is not None:
        model = _with_adapter(model, tokenizer, found.adapter)
        if found.generation_config.is_file():
            with _told_in_a_line(found.adapter):
                model.generation_config = GenerationConfig.from_pretrained(found.adapter)
    return model.eval(), tokenizer


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Return the model of a Hugging Face folder, and its tokenizer."""
    if not (folder / CONFIG).is_file():
        raise RecipeError(f"{folder}: no {CONFIG} there: give a Hugging Face folder, such as RUN_DIR/export")
    return load(ModelFolder(folder))


def _load_model(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with _told_in_a_line(folder):
        network = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _require_next_tokens(network.architectures or (), folder)
        kind = AutoModelForSeq2SeqLM if network.is_encoder_decoder else AutoModelForCausalLM
        # The annotations of transformers lack `output_loading_info`.
        loaded = kind.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
        model, loading = cast(tuple[nn.Module, dict[str, Any]], loaded)
    if loading["missing_keys"]:  # transformers would draw them at random
        raise DataError(f"{folder}: tensor {min(loading['missing_keys'])} is missing: fetch or export it again")
    return model


@contextmanager
def _told_in_a_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        # transformers, tokenizers, safetensors and peft each raise kinds of their own.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: cannot be loaded ({reason}): fetch or export it again") from error


def _require_next_tokens(architectures: Sequence[str], folder: Path) -> None:
    for head, does in {"SequenceClassification": "sorts texts into classes", "MaskedLM": "guesses masked tokens"}.items():
        if any(architecture.endswith(f"For{head}") for architecture in architectures):
            raise RecipeError(f"the model in {folder} {does}: give one that continues texts")


def _with_adapter(model: Any, tokenizer: Any, adapter: Path) -> Any:
    """Return the model with an adapter beside its weights."""
    if (adapter / bottleneck_format.CONFIG).is_file():
        return bottleneck_format.load_bottlenecks(model, adapter)
    if find_spec("peft") is None:
        raise RecipeError(f"{adapter}: peft loads an adapter's folder: pip install peft")
    if not (adapter / peft_format.WEIGHTS).is_file():
        raise DataError(f"{adapter}: no {peft_format.WEIGHTS} there: fetch or export it again")
    from peft import PeftModel

    # The rows of new tokens come with the adapter; its tokenizer says how many there are.
    if (adapter / "tokenizer_config.json").is_file() and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with _told_in_a_line(adapter), warnings.catch_warnings():
        # peft asks transformers by names that are going away.
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, adapter)
