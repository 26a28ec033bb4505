"""What a run starts from: the seed, a folder, or a folder and the seed where the folder lacks a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parallel.tensor import TensorParallel
from trainer.data.tokenizer_loading import make_tokenizer
from trainer.engine.first_weights import first_weights
from trainer.model.blocks import blocks_of
from trainer.model.transformer import Stage
from trainer.recipe import load

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 257}
KINDS: dict[str, tuple[Any, Any, Any, str]] = {
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
        "head.classifier.weight",
    ),
    "bert": (
        transformers.BertConfig,
        transformers.BertForMaskedLM,
        transformers.BertForSequenceClassification,
        "head.classifier.weight",
    ),
}


def weights_from(folder: Path, classes: tuple[str, ...], tmp_path: Path, seed: int = 5) -> dict[str, Tensor]:
    """The parameters of a classifier that begins with a folder's weights."""
    recipe = {
        "run": {"seed": seed},
        "model": {"from_pretrained": str(folder)},
        "data": {"task": "classify", "sources": [{"path": str(tmp_path)}], "seq_len": 16, "classes": list(classes)},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    network, fill = first_weights(load(tmp_path / "recipe.json"), make_tokenizer("bytes"), classes, resumed=False)
    stage = Stage(
        network,  # type: ignore[arg-type]
        blocks_of(network),  # type: ignore[arg-type]
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=fill,
    )
    return {name: parameter.detach() for name, parameter in stage.named_parameters()}


@pytest.mark.parametrize("family", KINDS)
def test_a_classifier_takes_the_body_and_the_head_where_it_has_the_same_classes(family: str, tmp_path: Path) -> None:
    config_class, language, classifier, head = KINDS[family]
    torch.manual_seed(3)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = config_class(**SIZES, max_position_embeddings=32, pad_token_id=0)
    language(config).save_pretrained(tmp_path / "language")
    sorts = classifier(config_class(**SIZES, max_position_embeddings=32, pad_token_id=0, **labels))
    sorts.save_pretrained(tmp_path / "sorts")

    of_language = weights_from(tmp_path / "language", ("bad", "good"), tmp_path)
    again = weights_from(tmp_path / "language", ("bad", "good"), tmp_path)
    other_seed = weights_from(tmp_path / "language", ("bad", "good"), tmp_path, seed=6)
    assert torch.equal(of_language[head], again[head]), "the head is drawn from the run's seed"
    assert not torch.equal(of_language[head], other_seed[head])
    body = [name for name in of_language if not name.startswith("head.")]
    assert all(torch.equal(of_language[name], other_seed[name]) for name in body), "the body is the folder's"

    same = weights_from(tmp_path / "sorts", ("bad", "good"), tmp_path)
    theirs = sorts.score.weight if family == "llama" else sorts.classifier.weight
    assert torch.equal(same[head], theirs)
    renamed = weights_from(tmp_path / "sorts", ("no", "yes"), tmp_path)
    assert not torch.equal(renamed[head], theirs), "a head for other classes is drawn"
    assert all(torch.equal(same[name], renamed[name]) for name in body)
