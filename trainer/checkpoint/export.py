"""The export of a checkpoint, of whatever layout, to a Hugging Face folder, in one process, with
one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.check import check_files, read_sound
from trainer.checkpoint.folder import HUGGING_FACE
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.tensor_file import TORCH_DTYPES, Slot, TensorFile, as_bytes, chunks, write_tensor_file
from trainer.checkpoint.weights import FORMATS, Contents, Filling, Tuned
from trainer.data.handed_on_tokenizer import beside_model, require_same
from trainer.data.tokenizer_loading import reopen_tokenizer
from trainer.errors import DataError, NotFinite, RecipeError
from trainer.files.durable import replacing_folder, require_new
from trainer.files.reading import told
from trainer.model.finite import WIDER, is_finite, overflow
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import INDEX, SHARD_BYTES, file_name, read_config, write_index
from trainer.tuning import bottleneck_format
from trainer.tuning.adapter_folder import AdapterFormat
from trainer.tuning.methods import method_of

# Relative to the largest logit: two implementations of one network sum in another order. 1e-6 was
# seen in fp32.
LOGITS_TOLERANCE = 1e-4


def require_mergeable(checkpoint: Path) -> None:
    """Raise RecipeError if `--merge` is impossible for the checkpoint."""
    tuned = Tuned.of(checkpoint, read_sound(checkpoint))
    if tuned is None or not tuned.has_adapter:
        raise RecipeError(f"--merge: {checkpoint} has no adapter: export it without")
    if why := method_of(tuned.recipe.tuning).not_merged:
        raise RecipeError(f"--merge: {checkpoint}: {why}: export it without")


def require_free(out: Path) -> None:
    """Raise RecipeError if something is there that is not an empty folder."""
    try:
        require_new(out)
    except OSError as error:
        raise RecipeError(f"{out}: {told(error)}: give a new folder, or --replace if it is an export") from None


@dataclass(frozen=True)
class Exported:
    folder: Path
    step: int
    tensors: int
    num_bytes: int
    dtype: str


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    whole: bool = False,
    replace: bool = False,
    write_beside: Callable[[Path], None] = lambda folder: None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write `out`, a new folder, whole or not at all, and read it back.

    With `replace` it may be there, and is gone when the new one is whole; the caller has made sure
    that it is an export. `write_beside` adds to the folder when the other files are in it.

    `dtype`: "fp32", "bf16", "fp16"; None: the format of training. For a tuned model an adapter is
    written. With `whole` it is the model, with what was learned added to its weights, or in the
    adapter's files beside them if the weights cannot take it up.

    DataError if the checkpoint is damaged, if a value is infinite in `dtype`, if the folder reads
    back different, or if transformers would tokenize differently there; NotFinite if a weight is
    not finite.
    """
    if not replace:
        require_free(out)
    manifest = read_sound(checkpoint)
    check_files(checkpoint, manifest.files)
    chosen = dtype or str(manifest.recipe["precision"]["dtype"])
    tuned = Tuned.of(checkpoint, manifest)
    model, beside = _contents(checkpoint, manifest, tuned, whole=whole)
    for contents in filter(None, (model, beside)):
        _require_finite(contents, manifest, chosen)
    sizes: dict[str, int] = {}
    try:
        with replacing_folder(out) as draft:
            shutil.copytree(checkpoint / HUGGING_FACE, draft, dirs_exist_ok=True, copy_function=shutil.copyfile)
            _write_tokenizer(draft)
            if model is not None:
                sizes |= _write_model(model, draft, chosen, shard_bytes)
            else:
                (draft / "config.json").unlink()  # an adapter's folder must not look like a model's
            if beside is not None and tuned is not None:
                sizes |= _write_adapter(beside, tuned.form, draft, chosen)
            write_beside(draft)
            for path in (draft, *draft.rglob("*")):  # a folder to hand on, unlike the checkpoint
                path.chmod(0o755 if path.is_dir() else 0o644)
    except OSError as error:
        raise RecipeError(f"{error.filename or out}: {error.strerror}: give a folder that can be written") from error
    return Exported(out, manifest.step, len(sizes), sum(sizes.values()), chosen)


def _contents(
    checkpoint: Path, manifest: Manifest, tuned: Tuned | None, *, whole: bool
) -> tuple[Contents | None, Contents | None]:
    """Return what is written of the model, and of what was trained beside it; at least one of them
    is not None."""
    if tuned is None or not tuned.has_adapter:
        return Contents(checkpoint, manifest, tuned, adapter=False), None
    model = Contents(checkpoint, manifest, tuned, adapter=False) if whole else None
    return model, None if whole and tuned.merges else Contents(checkpoint, manifest, tuned, adapter=True)


def _require_finite(contents: Contents, manifest: Manifest, dtype: str) -> None:
    for name in contents.tensors:
        for chunk in chunks(contents.whole(name)):
            if not is_finite(chunk):
                raise NotFinite(f"tensor {name}", step=manifest.step, began=manifest.not_finite_since)
            if told := overflow(name, chunk, TORCH_DTYPES[FORMATS[dtype]]):
                raise DataError(f"{told}: nothing is written; give --dtype {WIDER[dtype]}")


def _write_tokenizer(draft: Path) -> None:
    """Save the tokenizer in a form that transformers loads, beside this config.json, as the one
    that trained."""
    tokenizer = beside_model(reopen_tokenizer(draft), read_config(draft))
    tokenizer.save(draft)
    require_same(draft, tokenizer)


def _write_model(contents: Contents, draft: Path, dtype: str, shard_bytes: int) -> dict[str, int]:
    """Write a model's files of weights and its config, and return the bytes of each tensor."""
    slots = contents.slots(dtype)
    shards = list(_shards(slots, shard_bytes))
    files = {file_name(number, len(shards)): names for number, names in enumerate(shards)}
    for file, names in files.items():
        named = {name: slots[name] for name in names}
        write_tensor_file(draft / file, named, (contents.whole(name) for name in names), metadata={"format": "pt"})
        _compare(draft / file, names, contents)
    if len(files) > 1:
        write_index({file: {name: slots[name].num_bytes for name in names} for file, names in files.items()}, draft / INDEX)
    config = {**read_config(draft), "dtype": str(TORCH_DTYPES[FORMATS[dtype]]).removeprefix("torch.")}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {name: slot.num_bytes for name, slot in slots.items()}


def _write_adapter(contents: Contents, form: AdapterFormat, draft: Path, dtype: str) -> dict[str, int]:
    """Write an adapter's files, and return the bytes of each tensor."""
    tensors = ((name, contents.whole(name)) for name in contents.tensors)
    written, path = form.write(tensors, draft, TORCH_DTYPES[FORMATS[dtype]]), draft / form.weights_file
    file = TensorFile(path)
    for name, tensor in written.items():
        found = torch.empty(tensor.shape, dtype=file.dtype(name)).flatten()
        file.read(name, 0, found)
        if as_bytes(found) != as_bytes(tensor.flatten()):
            raise DataError(f"{path}: tensor {name} reads back as something else: is the disk sound?")
    return {name: tensor.nbytes for name, tensor in written.items()}


def _shards(slots: Mapping[str, Slot], shard_bytes: int) -> Iterator[list[str]]:
    """Yield names in the order of the model, for files of at most `shard_bytes` (or one tensor)."""
    names: list[str] = []
    size = 0
    for name, slot in slots.items():
        if names and size + slot.num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += slot.num_bytes
    yield names


def _compare(path: Path, names: Sequence[str], contents: Contents) -> None:
    """Raise DataError unless the file, read back, has every value."""
    file = TensorFile(path)
    for name in names:
        at = 0
        for chunk in chunks(contents.whole(name)):
            written = torch.empty(chunk.shape, dtype=file.dtype(name))
            file.read(name, at, written)
            if as_bytes(written) != as_bytes(chunk.to(written.dtype)):
                raise DataError(f"{path}: tensor {name} reads back as something else: is the disk sound?")
            at += chunk.numel()


def compare_logits(checkpoint: Path, out: Path, dtype: str) -> float:
    """Return the largest difference between two models' logits on random tokens, relative to the
    largest logit.

    One is the training model with the checkpoint's weights, the other the exported folder in
    transformers, both in fp32 from weights in the exported format. A tuned model is compared with
    the adapter beside its weights on one side, and merged, without rounding, on the other.
    """
    tuned = Tuned.of(checkpoint, read_sound(checkpoint))
    if tuned and not (out / "config.json").exists():
        remedy = "add --merge --dtype fp32" if tuned.merges else "this adapter cannot be merged: leave --verify out"
        raise RecipeError(f"--verify compares whole models: {remedy}")
    if tuned and tuned.merges and dtype != "fp32":
        raise RecipeError(f"--verify of a merged model needs --dtype fp32: in {dtype} the sum is rounded, its parts are not")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    manifest = read_sound(checkpoint)
    tokens_BS = torch.randint(0, 1 << 30, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = _auto_class(out).from_pretrained(out, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
        if (out / bottleneck_format.CONFIG).exists():
            bottleneck_format.load_bottlenecks(exported, out)
        tokens_BS %= exported.config.vocab_size
        padding = exported.config.pad_token_id
        if padding is not None:  # a classifier reads the last token before it
            tokens_BS[tokens_BS == padding] = (padding + 1) % exported.config.vocab_size
        theirs = exported.eval()(tokens_BS).logits
        del exported
        ours = _training_logits(checkpoint, manifest, tokens_BS, TORCH_DTYPES[FORMATS[dtype]])
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _auto_class(folder: Path) -> Any:
    """Return the transformers class that loads the folder's network with the head that was
    trained."""
    import transformers

    config = read_config(folder)
    if config.get("is_encoder_decoder"):
        raise RecipeError(
            "--verify compares networks of one text: leave it out for one that translates; it is read back anyway"
        )
    for head in ("SequenceClassification", "MaskedLM"):
        if any(architecture.endswith(f"For{head}") for architecture in config.get("architectures") or ()):
            return getattr(transformers, f"AutoModelFor{head}")
    return transformers.AutoModelForCausalLM


def _training_logits(checkpoint: Path, manifest: Manifest, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    from parallel.documents import Documents
    from parallel.tensor import TensorParallel
    from trainer.data.loader import MicroBatch
    from trainer.model.blocks import blocks_of
    from trainer.model.transformer import Stage
    from trainer.tuning.adapt import adaptation

    config: dict[str, Any] = read_config(checkpoint / HUGGING_FACE)
    family = str(manifest.recipe["model"]["family"])
    if family == "auto":
        raise RecipeError(
            "--verify compares with our own network; family auto is transformers' already, and is read back anyway"
        )
    tuned = Tuned.of(checkpoint, manifest)
    network = tuned.network if tuned else from_hf(family, config)
    stage = Stage(
        network,
        blocks_of(network),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        adapt=adaptation(tuned.recipe.tuning, network) if tuned else lambda block: None,
        fill=Filling(checkpoint, manifest, through=dtype),
    ).eval()
    B, S = tokens_BS.shape
    batch = MicroBatch(tokens_BS, Documents.whole_rows(B, S))
    logits: Tensor = stage(tokens_BS, batch=batch, output="logits")
    if network.classes:
        return logits[:, -1 if network.causal else 0]
    return logits[..., : network.vocab_size]
