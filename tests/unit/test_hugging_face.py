"""Hugging Face folders: out and in again bit by bit, and damaged ones refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel.documents import Documents
from parallel.params import ShardSpec, initialise, owned_specs
from parallel.tensor import TensorParallel
from tests.unit.model_folders import Bomb, assert_refused, read_all, saved
from tests.unit.oracle import assert_close, random_model, random_tokens
from tests.unit.shapes import BERT, GPT2, LLAMA, MODELS, B, S, V
from tests.unit.stages import stage_from
from trainer.data.loader import MicroBatch
from trainer.errors import DataError, RecipeError
from trainer.model.blocks import blocks_of
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import (
    INDEX,
    SINGLE,
    PretrainedWeights,
    local_folder,
    read_config,
    unread_weights,
    weights_file,
    write_folder,
)
from trainer.model.names import names_of
from trainer.model.transformer import Stage, logical_specs

TIED_LLAMA = MODELS["llama-mha-tied"]
ROUND_TRIPS = [MODELS["llama-biases"], TIED_LLAMA, MODELS["gpt2"], MODELS["gpt2-untied"]]


def new_stage(family: str, shape: dict[str, Any], seed: int = 3) -> Stage:
    config = from_hf(family, shape)
    return Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed),
    )


def local_tensors(stage: nn.Module) -> Iterator[tuple[ShardSpec, Tensor]]:
    for _, parameter, spec in owned_specs(stage):
        yield spec, parameter.detach()


def write(stage: Stage, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    config = to_hf(stage.config, dtype=str(dtype).removeprefix("torch."), eos_token_id=None)
    arguments = {"dtype": dtype, "config": config, "save_beside": lambda folder: None, **changes}
    write_folder(local_tensors(stage), folder, **arguments)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load_theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def assert_same_weights(left: Stage, right: Stage) -> None:
    for (name, a, _), (_, b, _) in zip(owned_specs(left), owned_specs(right), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------------- out and in


@pytest.mark.parametrize("shard_bytes", [4 << 30, 9_000, 1], ids=["one-file", "several", "one-each"])
@pytest.mark.parametrize(("family", "shape"), ROUND_TRIPS)
def test_what_is_written_loads_everywhere(family: str, shape: dict[str, Any], shard_bytes: int, tmp_path: Path) -> None:
    stage, folder = new_stage(family, shape), tmp_path / "deep" / "export"
    write(stage, folder, shard_bytes=shard_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (files == [SINGLE]) == (shard_bytes > 1 << 30) == (not (folder / INDEX).exists())
    if shard_bytes == 9_000:
        assert 1 < len(files) < len(stored(folder)), "several tensors in several files"
        largest_tensor = max(tensor.nbytes for tensor in stored(folder).values())
        for file in files:
            assert sum(t.nbytes for t in load_file(folder / file).values()) <= max(shard_bytes, largest_tensor)

    theirs = load_theirs(folder)
    tokens = random_tokens()
    with torch.no_grad():
        assert_close(
            stage(tokens, batch=MicroBatch(tokens, Documents.whole_rows(B, S)), output="logits"),
            theirs(input_ids=tokens).logits,
            1e-5,
            "logits",
        )
    for name, parameter in theirs.named_parameters():
        assert torch.equal(stored(folder)[name], parameter), name
    assert_same_weights(stage_from(folder), stage)


def test_the_index_of_several_files_is_that_of_transformers(tmp_path: Path) -> None:
    write(new_stage(*MODELS["gpt2"]), tmp_path / "ours", shard_bytes=9_000)
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    tensors = stored(tmp_path / "ours")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "ours" / file)


@pytest.mark.parametrize("max_shard_size", ["1GB", "5KB"])
@pytest.mark.parametrize(("family", "shape"), ROUND_TRIPS)
def test_what_transformers_wrote_is_written_back_bit_by_bit(
    family: str, shape: dict[str, Any], max_shard_size: str, tmp_path: Path
) -> None:
    random_model(family, shape).save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (tmp_path / "theirs" / INDEX).exists() == (max_shard_size == "5KB")
    write(stage_from(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_bf16_out_and_in(tmp_path: Path) -> None:
    stage = new_stage(*MODELS["llama-gqa"])
    write(stage, tmp_path / "export", dtype=torch.bfloat16)
    assert load_theirs(tmp_path / "export").dtype == torch.bfloat16
    for (name, got, _), (_, full, _) in zip(owned_specs(stage_from(tmp_path / "export")), owned_specs(stage), strict=True):
        assert torch.equal(got, full.bfloat16().float()), name


@pytest.mark.parametrize(("family", "shape"), [MODELS["gpt2"], TIED_LLAMA])
def test_names_of_a_model_without_its_head(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(family, shape)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    assert not stored(tmp_path / "base").keys() & stored(tmp_path / "whole").keys()
    assert_same_weights(stage_from(tmp_path / "base"), stage_from(tmp_path / "whole"))
    network = from_hf(family, shape)
    specs = logical_specs(network)
    PretrainedWeights(tmp_path / "base").check_names(specs, ties=names_of(network).ties(specs))


# ----------------------------------------------------------------------------------------------- folders of Bert


def bert(head: str, folder: Path) -> Path:
    """A random folder of transformers' Bert with this head."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, head)(transformers.BertConfig(**BERT))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def test_heads_that_bert_was_trained_with_beside_ours_are_left_where_they_are(tmp_path: Path) -> None:
    """The published folders hold the pooler and the head for the next sentence; the exported one is BertForMaskedLM's."""
    from transformers import BertForMaskedLM

    theirs = stored(bert("BertForPreTraining", tmp_path / "theirs"))
    read_all(tmp_path / "theirs")
    write(stage_from(tmp_path / "theirs"), tmp_path / "ours")
    ours = stored(tmp_path / "ours")
    left = {f"{module}.{what}" for module in ("bert.pooler.dense", "cls.seq_relationship") for what in ("weight", "bias")}
    assert theirs.keys() - ours.keys() == left
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    _, loading = BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading


def test_first_names_of_the_weights_of_norms(tmp_path: Path) -> None:
    """gamma and beta, as in the published bert-base-uncased."""
    expected = stage_from(bert("BertForMaskedLM", tmp_path))

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)

    read_all(change_tensors(tmp_path, rename))
    assert_same_weights(stage_from(tmp_path), expected)


def test_both_names_of_the_weights_of_one_norm_are_one_too_many(tmp_path: Path) -> None:
    norm = "bert.embeddings.LayerNorm"
    change_tensors(bert("BertForMaskedLM", tmp_path), lambda t: t.update({f"{norm}.gamma": t[f"{norm}.weight"].clone()}))
    assert_refused(tmp_path, DataError, 65, f"tensor {norm}.gamma has no place in the model")


DECODER, WORDS = "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"


def test_second_copies_of_what_bert_ties_are_no_fault_while_they_are_equal(tmp_path: Path) -> None:
    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DECODER}.weight"] = tensors[WORDS].clone()
        tensors[f"{DECODER}.bias"] = tensors["cls.predictions.bias"].clone()

    expected = stage_from(bert("BertForMaskedLM", tmp_path))
    read_all(change_tensors(tmp_path, repeat))
    assert_same_weights(stage_from(tmp_path), expected)
    change_tensors(tmp_path, lambda t: t[f"{DECODER}.bias"][5].add_(1e-3))
    assert_refused(tmp_path, DataError, 65, f"tensor {DECODER}.bias differs from cls.predictions.bias")
    change_tensors(tmp_path, lambda t: [t.pop(f"{DECODER}.bias"), t[f"{DECODER}.weight"][-1, 2].add_(1e-3)])
    assert_refused(tmp_path, DataError, 65, f"tensor {DECODER}.weight differs from {WORDS}", f"remove {DECODER}.weight")


@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification"])
def test_a_bert_without_its_masked_language_head_is_named(head: str, tmp_path: Path) -> None:
    assert_refused(bert(head, tmp_path), DataError, 65, "tensor cls.predictions", "is missing")


def test_an_untied_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    random_model(*MODELS["llama-gqa"]).base_model.save_pretrained(tmp_path)
    assert_refused(tmp_path, DataError, 65, "tensor lm_head.weight is missing")


# ------------------------------------------------------------------------------------------------------ bad folders


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


FC = "transformer.h.1.mlp.c_fc.weight"
WTE = "transformer.wte.weight"
TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(FC), f"tensor {FC} is missing: config.json and the weights do not belong together"),
    "extra layer": (
        lambda t: t.update({"transformer.h.2.ln_1.weight": torch.ones(30)}),
        "tensor transformer.h.2.ln_1.weight has no place in the model",
    ),
    "two extra": (lambda t: t.update(a=torch.ones(1), b=torch.ones(1)), "tensor a (and 1 more) has no place in the model"),
    "extra of a bare model": (lambda t: t.update({"h.0.extra": torch.ones(1)}), "tensor h.0.extra has no place in the model"),
    "shape": (
        lambda t: t.update({FC: torch.ones(30, 119)}),
        f"tensor {FC} has shape [30, 119], the config asks for [30, 120]",
    ),
    "transposed": (
        lambda t: t.update({FC: t[FC].t().contiguous()}),
        f"tensor {FC} has shape [120, 30], the config asks for [30, 120]",
    ),
    "nan": (lambda t: t[FC].view(-1)[7].fill_(torch.nan), f"tensor {FC} holds NaN or infinity"),
    "infinity": (lambda t: t[WTE].view(-1)[7].fill_(-torch.inf), f"tensor {WTE} holds NaN or infinity"),
    "quantized": (lambda t: t.update({FC: t[FC].to(torch.int8)}), f"tensor {FC} is I8: quantized weights cannot be trained"),
    "head that is not tied": (
        lambda t: t.update({"lm_head.weight": t[WTE] + 1e-3}),
        f"tensor lm_head.weight differs from {WTE}, but config.json ties them",
    ),
    "head of another shape": (
        lambda t: t.update({"lm_head.weight": torch.ones(V, 31)}),
        f"tensor lm_head.weight has shape [{V}, 31], the config asks for [{V}, 30]",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_tensor_that_is_wrong_is_named(fault: str, tmp_path: Path) -> None:
    change, said = TENSOR_FAULTS[fault]
    assert_refused(change_tensors(saved(tmp_path), change), DataError, 65, said)


@pytest.mark.parametrize(("family", "shape"), [MODELS["gpt2"], TIED_LLAMA])
def test_buffers_of_older_versions_and_a_second_copy_of_a_tied_head_are_no_fault(
    family: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        embedding = WTE if family == "gpt2" else "model.embed_tokens.weight"
        tensors["lm_head.weight"] = tensors[embedding].clone()

    expected = stage_from(saved(tmp_path, family, shape))
    read_all(change_tensors(tmp_path, add))
    assert_same_weights(stage_from(tmp_path), expected)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path) / SINGLE
    os.truncate(path, path.stat().st_size - 100)
    assert_refused(tmp_path, DataError, 65, str(path), "cannot be read")
    path.write_bytes(b"")
    assert_refused(tmp_path, DataError, 65, str(path), "cannot be read")


Index = dict[str, Any]
INDEX_FAULTS: dict[str, tuple[Callable[[Index], object], str]] = {
    "parent": (lambda i: i["weight_map"].update({WTE: "../x.safetensors"}), f"tensor {WTE} points outside the folder"),
    "parent itself": (lambda i: i["weight_map"].update({WTE: ".."}), f"tensor {WTE} points outside the folder"),
    "absolute": (lambda i: i["weight_map"].update({WTE: "/etc/passwd"}), f"tensor {WTE} points outside the folder"),
    "below": (lambda i: i["weight_map"].update({WTE: "a/b.safetensors"}), f"tensor {WTE} points outside the folder"),
    "no name": (lambda i: i["weight_map"].update({WTE: ""}), f"tensor {WTE} points outside the folder"),
    "number": (lambda i: i["weight_map"].update({WTE: 3}), f"tensor {WTE} points outside the folder"),
    "missing file": (lambda i: i["weight_map"].update({WTE: "other.safetensors"}), "other.safetensors: cannot be read"),
    "wrong file": (
        lambda i: i["weight_map"].update({WTE: i["weight_map"][FC]}),
        f"tensor {WTE} cannot be read",
    ),
    "missing tensor": (lambda i: i["weight_map"].pop(FC), f"tensor {FC} is missing"),
    "no map": (lambda i: i.pop("weight_map"), "no valid weight_map"),
    "list": (lambda i: i.update(weight_map=[1]), "no valid weight_map"),
    "text": (lambda i: i.update(weight_map="x"), "no valid weight_map"),
    "null": (lambda i: i.update(weight_map=None), "no valid weight_map"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_is_wrong_is_named(fault: str, tmp_path: Path) -> None:
    random_model("gpt2", GPT2).save_pretrained(tmp_path, max_shard_size="9KB")
    index = json.loads((tmp_path / INDEX).read_text())
    change, said = INDEX_FAULTS[fault]
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, DataError, 65, said)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"3"])
def test_an_index_that_is_not_json_is_named(text: bytes, tmp_path: Path) -> None:
    random_model("gpt2", GPT2).save_pretrained(tmp_path, max_shard_size="9KB")
    (tmp_path / INDEX).write_bytes(text)
    assert_refused(tmp_path, DataError, 65, INDEX, "no valid weight_map")


def with_stale_files(folder: Path, leave: str) -> Path:
    """A model saved in several files, and another one saved over it in one."""
    old, new = random_model("gpt2", GPT2), random_model("gpt2", GPT2)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1.0)
    new.save_pretrained(folder / "new")
    old.save_pretrained(folder, max_shard_size="9KB")
    match leave:
        case "index and shards":
            (folder / "new" / SINGLE).rename(folder / SINGLE)
        case "index":
            for shard in folder.glob("model-*"):
                shard.unlink()
            (folder / "new" / SINGLE).rename(folder / SINGLE)
        case "shards":
            (folder / INDEX).unlink()
            (folder / "new" / SINGLE).rename(folder / SINGLE)
        case "a shard beside the index":
            (folder / "new" / SINGLE).rename(folder / "model-00077-of-00077.safetensors")
        case "a variant":
            (folder / "new" / SINGLE).rename(folder / "model.fp16.safetensors")
        case "what config.json names":
            (folder / "new" / SINGLE).rename(folder / "other.safetensors")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    return folder


LEFT = ["index and shards", "index", "shards", "a shard beside the index", "a variant", "what config.json names"]


@pytest.mark.parametrize("leave", LEFT)
def test_of_several_saves_the_one_is_read_that_transformers_reads(leave: str, tmp_path: Path) -> None:
    folder = with_stale_files(tmp_path, leave)
    theirs = dict(load_theirs(folder).named_parameters())
    weights = PretrainedWeights(folder)
    for spec in logical_specs(from_hf("gpt2", GPT2)):
        for piece in spec.pieces:
            box = tuple(slice(at, at + size) for at, size in zip(piece.start, piece.size, strict=True))
            assert torch.equal(weights.read(piece), theirs[piece.name][box]), piece.name
    (said,) = unread_weights(folder)
    assert f"the weights are those of {weights_file(folder)}, as in transformers; not read: " in said
    assert (INDEX in said) == (leave in ("index", "index and shards", *LEFT[3:]))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    random_model("gpt2", GPT2).save_pretrained(tmp_path, max_shard_size="9KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second, metadata={"format": "pt"})
    assert_refused(tmp_path, DataError, 65, f"tensor {name} is in model-0", "files of several models")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("../model.safetensors", "no file of weights beside it"),
        ("gone.safetensors", "is not there"),
        (3, "no file of weights beside it"),
    ],
)
def test_weights_that_config_json_names_wrongly_are_refused(named: object, said: str, tmp_path: Path) -> None:
    config = read_config(saved(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with pytest.raises(DataError, match=said):
        PretrainedWeights(tmp_path)


def test_a_folder_of_a_variant_alone_is_refused_by_its_name(tmp_path: Path) -> None:
    (saved(tmp_path) / SINGLE).rename(tmp_path / "model.fp16.safetensors")
    assert_refused(tmp_path, RecipeError, 78, "there is model.fp16.safetensors, which transformers does not load either")


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (saved(tmp_path / "model") / SINGLE).unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    assert_refused(tmp_path / "model", RecipeError, 78, "pytorch_model.bin", "never opened")
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "model" / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "executed").exists(), "the bomb must be live, or the test proves nothing"


def test_a_folder_without_weights_or_config(tmp_path: Path) -> None:
    (saved(tmp_path) / SINGLE).unlink()
    assert_refused(tmp_path, RecipeError, 78, "give a Hugging Face folder with weights")
    (tmp_path / "config.json").unlink()
    assert_refused(tmp_path, RecipeError, 78, "config.json", "No such file")


@pytest.mark.parametrize("text", [b"[1]", b"null", b'"x"', b"{", b"\xff\xfe", b""])
def test_a_config_that_is_no_json_object(text: bytes, tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_bytes(text)
    assert_refused(tmp_path, DataError, 65, "config.json: not ")


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), None) == tmp_path


# ----------------------------------------------------------------------------------------- whole or not at all


def nothing_left(parent: Path) -> bool:
    return list(parent.iterdir()) == []


def test_a_failure_in_the_middle_leaves_no_folder(tmp_path: Path) -> None:
    stage = new_stage("gpt2", GPT2)

    def broken() -> Iterable[tuple[ShardSpec, Tensor]]:
        yield from list(local_tensors(stage))[:5]
        raise RuntimeError("the cable was pulled")

    with pytest.raises(RuntimeError, match="the cable was pulled"):
        write_folder(
            broken(), tmp_path / "export", dtype=torch.float32, config={}, save_beside=lambda folder: None, shard_bytes=1
        )
    assert nothing_left(tmp_path)


def test_a_failure_at_the_end_leaves_the_older_export(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    write(new_stage("gpt2", GPT2, seed=1), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_room(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(new_stage("gpt2", GPT2, seed=2), folder, save_beside=no_room)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_an_older_export_and_leftovers_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    write(new_stage("llama", LLAMA), folder, shard_bytes=9_000)
    for leftover in (".export.0123abcd.tmp", ".export.0123abcd.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "0.part").write_bytes(b"left by a killed run")
    stage = new_stage("gpt2", GPT2)
    write(stage, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SINGLE]
    assert list(tmp_path.iterdir()) == [folder]
    assert_same_weights(stage_from(folder), stage)


def test_a_rank_that_does_not_write_takes_part_in_the_gathering() -> None:
    taken = []

    def tensors() -> Iterator[tuple[ShardSpec, Tensor]]:
        for spec, tensor in local_tensors(new_stage("gpt2", GPT2)):
            taken.append(spec)
            yield spec, tensor

    write_folder(tensors(), None, dtype=torch.float32, config={}, save_beside=lambda folder: pytest.fail("wrote"))
    assert taken == logical_specs(from_hf("gpt2", GPT2))
    assert taken[0].pieces[0].name == WTE, "in the order of the model"


def test_a_parameter_that_was_not_gathered_is_never_written(tmp_path: Path) -> None:
    tensors = [(spec, torch.empty(0)) for spec, _ in local_tensors(new_stage("gpt2", GPT2))]
    with pytest.raises(RuntimeError, match=r"wte\.weight: empty parameter"):
        write_folder(tensors, tmp_path / "e", dtype=torch.float32, config={}, save_beside=lambda folder: None)
    assert nothing_left(tmp_path)


def test_an_incomplete_tensor_is_never_written(tmp_path: Path) -> None:
    """Fused q, k, v of gpt2 are three boxes of one tensor; without one of them it must not be written."""
    from dataclasses import replace

    tensors = []
    for spec, tensor in local_tensors(new_stage("gpt2", GPT2)):
        tensors.append((replace(spec, pieces=spec.pieces[:2]), tensor))
    with pytest.raises(RuntimeError, match=r"incomplete tensors: .*c_attn\.weight"):
        write_folder(tensors, tmp_path / "e", dtype=torch.float32, config={}, save_beside=lambda folder: None)
    assert nothing_left(tmp_path)


# ---------------------------------------------------------------------------------------------- a run refuses it


def test_a_run_refuses_weights_that_do_not_belong_to_the_config(tmp_path: Path) -> None:
    """Extra tensors would train a smaller model than the folder holds; only `check_names` sees them."""
    import subprocess
    import sys

    change_tensors(saved(tmp_path / "model", "gpt2", {**GPT2, "vocab_size": 300}), TENSOR_FAULTS["extra layer"][0])
    (tmp_path / "text.txt").write_text("a text to train on. " * 200)
    recipe = {
        "run": {"name": "x", "dir": str(tmp_path / "runs")},
        "model": {"from_pretrained": str(tmp_path / "model")},
        "data": {
            "sources": [{"path": str(tmp_path / "text.txt")}],
            "tokenizer": "bytes",
            "seq_len": 16,
            "eval_fraction": 0.0,
            "cache_dir": str(tmp_path / "cache"),
        },
        "batch": {"global_sequences": 1, "micro_sequences": 1},
        "train": {"steps": 1},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", str(tmp_path / "recipe.json")],
        env={k: v for k, v in os.environ.items() if k not in launcher} | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 65, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "tensor transformer.h.2.ln_1.weight has no place in the model" in errors[0]
