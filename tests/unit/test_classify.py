"""Classification: rows → labelled tokens, which positions count, and the heads against transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from parallel.documents import Documents
from parallel.loss import IGNORE
from parallel.params import initialise, owned_specs
from parallel.tensor import TensorParallel
from trainer.data import PreparedData, prepare
from trainer.data.labelled import in_order
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.targets import targets_of
from trainer.data.tokenizer_loading import load_tokenizer
from trainer.errors import DataError, RecipeError
from trainer.inference.weights import Weights
from trainer.model import heads, measures
from trainer.model.blocks import blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.heads import Classes, LabelHead, Objective
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import PretrainedWeights, read_config, write_folder
from trainer.model.measures import MEASURES, ClassMeasures, EvalResult
from trainer.model.model_files import ModelFiles
from trainer.model.objective import OBJECTIVES
from trainer.model.transformer import Stage
from trainer.recipe import load
from trainer.recipe.network import with_head
from trainer.schema import Data, Recipe
from trainer.tasks import TASKS

S, END = 16, 256
ROWS = [("good", "good film"), ("bad", "dull"), ("good", "warm"), ("bad", "no"), ("odd", "a"), ("bad", "never, ever")]


def data_of(path: Path, **keys: Any) -> Data:
    return Data.model_validate({"task": "classify", "sources": [{"path": str(path)}], "seq_len": S, "workers": 1, **keys})


def prepared(data: Data, folder: Path) -> PreparedData:
    return prepare(data, seed=0, cache_dir=folder / "cache", build=True, progress=lambda done, total, what: None)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in ROWS))
    return path


@pytest.mark.parametrize("causal", [False, True])
def test_the_label_is_where_the_network_has_seen_all_of_the_text(causal: bool, rows: Path, tmp_path: Path) -> None:
    data = data_of(rows, eval_fraction=0.0)
    found = prepared(data, tmp_path)
    assert found.classes == ("bad", "good", "odd")
    targets = targets_of(data, found.tokenizer, causal=causal, seed=0, part="training")
    keys: dict[str, Any] = {"row_tokens": S, "isolate_documents": True}
    loader = TrainData(found.train, found.weights, seed=0, global_sequences=1, targets=targets, **keys)
    seen = []
    for step in range(loader.num_samples):
        read, unread = (
            next(loader.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1, read=read)) for read in (True, False)
        )
        assert torch.equal(read.labels_BS, unread.labels_BS), "ranks that read no tokens count the same targets"
        begin = 0
        for length in read.documents.lengths[0]:
            tokens, labels = (part[0, begin : begin + length] for part in (read.tokens_BS, read.labels_BS))
            (at,) = np.nonzero((labels != IGNORE).numpy())
            if len(at):
                assert at.tolist() == [length - 1 if causal else 0]
                assert tokens[0] == END
                seen.append((found.classes[int(labels[at[0]])], bytes(tokens[1:].tolist()).decode()))
            else:
                assert (tokens == END).all(), "only filler has no label"
            begin += length
    assert sorted(seen) == sorted(ROWS)


def test_evaluation_counts_each_text_once(rows: Path, tmp_path: Path) -> None:
    data = data_of(rows, eval_sources=[{"path": str(rows)}])
    found = prepared(data, tmp_path)
    targets = targets_of(data, found.tokenizer, causal=True, seed=0, part="evaluation")
    held_out = EvalData(found.evaluation, row_tokens=S, isolate_documents=True, sequences=99, targets=targets)
    batches = [batch for dp_rank in range(2) for batch in held_out.micro_batches(dp_rank=dp_rank, dp=2, micro_sequences=2)]
    assert sum(batch.num_targets for batch in batches) == len(ROWS)


def test_delimited_files_with_and_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('he said "no\t0\nfine\t1\n')
    (tmp_path / "b.csv").write_text('label,text\n1,"x, ""y"""\n0,z\n')
    sources = [{"path": str(tmp_path / "a.tsv"), "columns": ["text", "label"]}, {"path": str(tmp_path / "b.csv")}]
    found = prepared(data_of(tmp_path, sources=sources, eval_fraction=0.0), tmp_path)
    texts = [
        bytes(token for token in store.slice(0, store.num_tokens).tolist() if token != END).decode() for store in found.train
    ]
    assert [sorted(text) for text in texts] == [sorted('he said "nofine'), sorted('x, "y"z')]
    assert found.classes == ("0", "1")


def test_labels_that_are_numbers_are_ordered_by_value() -> None:
    assert in_order(["10", "9", "1"]) == ["1", "9", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]


def test_long_texts_are_cut_and_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [{"text": "x" * 40, "label": 1}, {"text": "y", "label": 0}, {"text": " ", "label": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    found = prepared(data_of(path, eval_fraction=0.0), tmp_path)
    assert any("1 of 3 texts were longer than 16 tokens: truncated, 25 tokens lost" in note for note in found.notes)
    assert any("1 of 3 texts left out: empty" in note for note in found.notes)
    loaded = transformers.AutoTokenizer.from_pretrained(save(found, tmp_path))
    assert loaded("x" * 40, truncation=True, max_length=S)["input_ids"] == [END, *b"x" * 15]


def save(found: PreparedData, folder: Path) -> Path:
    found.tokenizer.save(folder / "tokenizer")
    again = load_tokenizer(str(folder / "tokenizer")).for_classification()
    assert again.encode_sequence("a b", max_tokens=9) == found.tokenizer.encode_sequence("a b", max_tokens=9)
    return folder / "tokenizer"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no 'label': it has 'text'"),
        ({"text": 3, "label": "x"}, "'text' is a number, not text"),
        ({"text": "a", "label": -1}, "published data hides the label"),
        ({"text": "a", "label": 0.5}, "a label is a word or a whole number"),
        ({"text": "a", "label": True}, "a label is a word or a whole number"),
    ],
)
def test_a_row_that_is_no_labelled_text_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "b", "label": "c"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said) as refused:
        prepared(data_of(path), tmp_path)
    assert f"{path}:2" in str(refused.value)


def test_a_single_class_and_an_unlisted_one_are_refused(rows: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "c"}\n')
    with pytest.raises(DataError, match="its only label is 'c'"):
        prepared(data_of(one), tmp_path)
    with pytest.raises(DataError, match=r"the label 'odd' is not in data.classes \('good', 'bad'\)"):
        prepared(data_of(rows, classes=["good", "bad"]), tmp_path)


def test_scores_against_their_definitions() -> None:
    """Hand-counted: class 0 3 right and 1 missed, class 1 2 right and 2 missed."""
    record = ClassMeasures(2).record(EvalResult((4.0, 3.0, 1.0, 2.0, 2.0), 8))
    assert record["eval_loss"] == 0.5
    assert record["eval_accuracy"] == 5 / 8
    assert record["eval_majority"] == 0.5
    assert record["eval_f1_positive"] == pytest.approx(2 * 2 / (4 + 3))
    assert record["eval_f1"] == pytest.approx((2 * 3 / (4 + 5) + 2 * 2 / (4 + 3)) / 2)
    absent = ClassMeasures(3).record(EvalResult((4.0, 3, 1, 0, 2, 2, 0, 0, 0, 0), 8))
    assert absent["eval_f1"] == record["eval_f1"], "a class that neither occurs nor is named does not count"
    assert "eval_f1_positive" not in absent


def test_many_classes_are_measured_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts counted by pairs, and class by class as where pairs would take too much memory."""
    stream = torch.Generator().manual_seed(0)
    config = from_hf("llama", {**SIZES["llama"], "vocab_size": 300, "id2label": {str(i): str(i) for i in range(7)}})
    head = LabelHead(replace(config, classes=tuple("abcdefg")), tp=TensorParallel.alone(), objective=Classes())
    initialise(head, 0)
    x_ND, labels_BS = torch.randn(400, 24, generator=stream), torch.randint(-1, 7, (1, 400), generator=stream)
    labels_BS[labels_BS < 0] = IGNORE
    records = []
    for most in (1000, 6):
        monkeypatch.setattr(measures, "PAIRED_CLASSES", most)
        monkeypatch.setattr(heads, "PAIRED_CLASSES", most)
        sums = head.sums(x_ND, MicroBatch(labels_BS, Documents.whole_rows(1, 400), labels_BS))
        found = ClassMeasures(7)
        assert len(sums) == found.num_sums == (50 if most == 1000 else 22)
        result = EvalResult(tuple(sums.tolist()), int((labels_BS != IGNORE).sum()))
        records.append(found.record(result))
        assert bool(found.confusion(result)) == (most == 1000)
    assert records[0] == records[1]


def test_a_thousand_classes_and_more(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": i}) + "\n" for i in range(1100)))
    found = prepared(data_of(path, eval_fraction=0.0), tmp_path)
    assert found.classes == tuple(map(str, range(1100)))


# -------------------------------------------------------------------------------------------- heads against transformers'

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36},
    "qwen3": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 36,
        "head_dim": 6,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "tie_word_embeddings": True},
    "bert": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 36,
        "max_position_embeddings": 32,
    },
}
CLASSES = ("bad", "good", "odd")


def network(family: str) -> TransformerConfig:
    return replace(from_hf(family, {**SIZES[family], "vocab_size": 257}), classes=CLASSES)


def stage_of(config: TransformerConfig, fill: Any, objective: Objective | None = None) -> Stage:
    return Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=fill,
        objective=objective,
    ).eval()


@pytest.mark.parametrize("family", SIZES)
def test_an_export_is_the_same_classifier_in_transformers(family: str, rows: Path, tmp_path: Path) -> None:
    """Logits, loss and every gradient of padded texts there and packed ones here."""
    found = prepared(data_of(rows, eval_fraction=0.0), tmp_path)
    config = network(family)
    ours = stage_of(config, lambda block: initialise(block, seed=3))
    with torch.no_grad():
        for _, parameter, _ in owned_specs(ours):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.05)
    files = ModelFiles(config, found.tokenizer, "float32", task="classify")
    tensors = [(spec, parameter.detach()) for _, parameter, spec in owned_specs(ours)]
    write_folder(tensors, tmp_path / "out", dtype=torch.float32, config=files.config, save_beside=files.save_others)

    theirs, told = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.problem_type == "single_label_classification"
    assert theirs.config.finetuning_task == "classify"
    texts = ["good film", "no", "never, ever"]
    classes = torch.tensor([1, 0, 2])
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = theirs.eval()(**inputs, labels=classes)

    documents = [found.tokenizer.encode_sequence(text, max_tokens=S)[0] for text in texts]
    lengths = [len(ids) for ids in documents]
    at = np.cumsum(lengths) - 1 if config.causal else np.cumsum([0, *lengths[:-1]])
    tokens_BS = torch.tensor([[token for ids in documents for token in ids]])
    labels_BS = torch.full_like(tokens_BS, IGNORE)
    labels_BS[0, at] = classes
    packed = Documents((tuple(lengths),))
    # fp32 in another order of sums: seen 2e-7.
    torch.testing.assert_close(
        ours(tokens_BS, batch=MicroBatch(tokens_BS, packed), output="logits")[0, at], out.logits, rtol=0, atol=2e-6
    )
    loss = ours(tokens_BS, batch=MicroBatch(tokens_BS, packed, labels_BS))
    torch.testing.assert_close(loss, 3 * out.loss, rtol=2e-6, atol=0)
    sums = ours(tokens_BS, batch=MicroBatch(tokens_BS, packed, labels_BS), output="sums")
    named = out.logits.argmax(-1)
    assert sums[1:].reshape(3, 3).nonzero().tolist() == sorted([int(c), int(n)] for c, n in zip(classes, named, strict=True))

    loss.backward()
    (3 * out.loss).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for _, parameter, spec in owned_specs(ours):
        for piece in spec.pieces:
            grad = expected[piece.name]
            box = piece.box_of(torch.zeros(piece.shape) if grad is None else grad)
            got = piece.in_parameter(parameter.grad).clone()
            if piece.shape[0] == 257:
                got[END] = box[END] = 0.0  # their embedding never learns the token that pads, which here opens texts
            torch.testing.assert_close(got, box, rtol=1e-4, atol=2e-6, msg=lambda said, name=piece.name: f"{name}: {said}")
    again = stage_of(from_hf(family, read_config(tmp_path / "out")), PretrainedWeights(tmp_path / "out").fill)
    assert again.config.classes == CLASSES
    assert torch.equal(
        again(tokens_BS, batch=MicroBatch(tokens_BS, packed), output="logits"),
        ours(tokens_BS, batch=MicroBatch(tokens_BS, packed), output="logits"),
    )


@pytest.mark.parametrize("says", [None, "classify", "mrpc", "pretrain", ["classify"]])
def test_a_folder_with_a_head_over_texts_is_evaluated_as_a_classifier(says: Any, tmp_path: Path) -> None:
    """transformers passes on what a folder said before it was given this head."""
    given = Weights.named(str(folder_of(tmp_path, says))).given(files=[])
    assert given["data"]["task"] == "classify"
    assert given["data"]["classes"] == list(CLASSES)


def test_a_folder_with_a_head_of_our_own_is_evaluated_by_the_task_that_trained_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "rate", replace(TASKS["classify"], outputs=("rating",), learns_classes=False))
    given = Weights.named(str(folder_of(tmp_path, "rate"))).given(files=[])
    assert given["data"]["task"] == "rate"
    assert "classes" not in given["data"]


def folder_of(folder: Path, task: Any) -> Path:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(CLASSES))}
    (folder / "config.json").write_text(json.dumps(config | ({} if task is None else {"finetuning_task": task})))
    return folder


@pytest.mark.parametrize(
    ("family", "of_head", "rate"), [("bert", None, 0.2), ("bert", 0.5, 0.5), ("bert", 0.0, 0.0), ("llama", 0.5, 0.0)]
)
def test_the_heads_dropout_is_its_own_where_it_has_one(family: str, of_head: float | None, rate: float) -> None:
    """As in transformers: that of the hidden states where it is not given, and none behind a decoder."""
    config = replace(network(family), residual_dropout=0.2, classifier_dropout=of_head)
    assert stage_of(config, lambda block: initialise(block, seed=3)).head.dropout.rate == rate


def test_every_task_says_what_it_minimises_and_what_it_measures() -> None:
    assert OBJECTIVES.keys() == MEASURES.keys() == TASKS.keys()


def test_a_task_of_labels_says_what_its_head_gives_and_every_other_has_a_vocabulary() -> None:
    for name, task in TASKS.items():
        given = Recipe.model_validate({"data": {"task": name}})
        classes = with_head(given, network("llama")).classes
        assert classes == task.outputs, "until the data is read"
        assert bool(classes) == (task.target == "label")
    listed = Recipe.model_validate({"data": {"task": "classify", "classes": ["a", "b"]}})
    assert with_head(listed, network("llama")).classes == ("a", "b")
    assert with_head(listed, network("llama"), CLASSES).classes == CLASSES


class Distances:
    """Half the squared distance between the outputs and a row of ones at the label."""

    def loss(self, outputs_LC: torch.Tensor, labels_L: torch.Tensor) -> torch.Tensor:
        return (outputs_LC - torch.nn.functional.one_hot(labels_L, len(CLASSES))).square().sum() / 2

    def statistics(self, outputs_LC: torch.Tensor, labels_L: torch.Tensor) -> torch.Tensor:
        return torch.stack([outputs_LC.double().sum(), labels_L.double().sum()])


def test_a_head_minimises_what_its_task_says() -> None:
    """Loss, statistics, and the bias's gradient, which is the sum of the distances."""
    ours = stage_of(network("bert"), lambda block: initialise(block, seed=3), Objective(of_labels=Distances()))
    tokens_BS = torch.arange(8).view(1, 8)
    labels_BS = torch.full_like(tokens_BS, IGNORE)
    labels_BS[0, [0, 5]] = torch.tensor([2, 1])
    batch = MicroBatch(tokens_BS, Documents(((5, 3),)), labels_BS)
    outputs_LC = ours(tokens_BS, batch=batch, output="logits")[0, [0, 5]].detach()
    distances_LC = outputs_LC - torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    loss = ours(tokens_BS, batch=batch)
    loss.backward()
    # fp32 in another order of sums.
    torch.testing.assert_close(loss, distances_LC.square().sum() / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.head.classifier.bias.grad, distances_LC.sum(0), rtol=1e-6, atol=1e-7)
    expected = torch.stack([loss.detach().double(), outputs_LC.double().sum(), torch.tensor(3.0, dtype=torch.float64)])
    torch.testing.assert_close(ours(tokens_BS, batch=batch, output="sums"), expected, rtol=1e-6, atol=1e-7)


def test_a_head_without_a_document_of_its_own_gives_no_loss() -> None:
    ours = stage_of(network("llama"), lambda block: initialise(block, seed=3))
    tokens_BS = torch.zeros(1, 4, dtype=torch.int64)
    loss = ours(tokens_BS, batch=MicroBatch(tokens_BS, Documents(((4,),)), torch.full_like(tokens_BS, IGNORE)))
    loss.backward()
    assert loss == 0.0
    assert not ours.head.classifier.weight.grad.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"family": "auto", "config": {"model_type": "bert"}}}, "name a family that is built here"),
        ({"tuning": {"method": "lora"}}, "the head must be trained; legal: none"),
        ({"data": {"isolate_documents": False}}, "a text must not see the others of its sequence"),
        ({"data": {"classes": ["a", "a"]}}, "two or more names, each once"),
        ({"data": {"task": "mlm"}}, "legal families for mlm: bert"),
        ({"train": {"label_smoothing": 0.1}}, "a vocabulary, which is not predicted"),
        ({"data": {"mask_fraction": 0.2}}, 'data.mask_fraction is used only with data.task "mlm"'),
        ({"data": {"sources": [{"path": "ROWS", "field": "t"}]}}, "what rows call their fields is said in fields"),
        (
            {"data": {"sources": [{"path": "ROWS", "fields": {"prompt": "q"}}]}},
            "fields.prompt is used only with",
        ),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_there(change: dict[str, Any], said: str, rows: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model": {"family": "llama", "config": SIZES["llama"]},
        "data": {"task": "classify", "sources": [{"path": "ROWS"}], "seq_len": S},
        "batch": {"global_sequences": 1, "micro_sequences": 1},
    }
    for section, values in change.items():
        recipe[section] = {**recipe.get(section, {}), **values} if section != "model" else values
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe).replace("ROWS", str(rows)))
    with pytest.raises(RecipeError) as refused:
        load(path)
    assert said in "\n".join(refused.value.lines)
