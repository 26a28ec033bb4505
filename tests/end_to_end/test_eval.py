"""`triaxis eval` as a user starts it: of a checkpoint in other layouts than it was trained in, and of what was exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.end_to_end.runs import HEADS, write_bert_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.cli import main
from trainer.data.tokenizer_loading import train_bpe
from trainer.inference.model_folder import load_folder
from trainer.track import read_metrics

ROWS = [{"prompt": f"{n} is", "completion": "odd" if n % 2 else "even"} for n in range(40)]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
MARIAN = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
}
# Losses of other layouts are sums in another order; logits of fp32 of about 10 are rounded by 1e-6.
RELATIVE, ABSOLUTE = 1e-6, 1e-6
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LAYOUTS = {
    "dp2": (2, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "tp2xpp2": (4, ("parallel.tensor=2", "parallel.pipeline=2", "batch.micro_sequences=3")),
}


def write_recipe(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe: dict[str, Any] = {
        "run": {"name": "parity", "dir": str(folder / "runs")},
        "model": {"family": "llama", "config": {**HEADS, **SIZES}},
        "data": {"task": "sft", "sources": [{"path": str(folder / "rows.jsonl")}], "seq_len": 64, "workers": 1},
        "batch": {"global_sequences": 4, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "train": {"steps": 40, "eval_every": 20, "eval_sequences": 2},
        "checkpoint": {"every": 20, "keep": 9},
    }
    recipe["data"]["eval_fraction"] = 0.3
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    ended = run_ranks(train, [str(write_recipe(folder))], world_size=1, log=folder / "log")
    assert ended.codes == (0,), ended.said
    return folder


def ask(*words: str, log: Path, world_size: int = 1) -> Ended:
    return run_ranks(main, ["eval", *words], world_size=world_size, log=log)


def found(*words: str, log: Path, world_size: int = 1) -> dict[str, Any]:
    ended = ask(*words, "--json", log=log, world_size=world_size)
    assert set(ended.codes) == {0}, ended.said
    result: dict[str, Any] = json.loads((log / "rank-0.txt").read_text().partition("\n{")[2].join(("{", "")))
    return result


def test_what_was_held_out_gives_what_the_run_said(folder: Path, tmp_path: Path) -> None:
    run = folder / "runs" / "parity"
    said = {record["step"]: record for record in read_metrics(run / "evaluations.jsonl")}
    for step, weights in ((40, run), (20, run / "checkpoints" / "step-00000020")):
        measured = found(str(weights), log=tmp_path / str(step))
        assert measured["step"] == step
        for name in ("loss", "perplexity", "accuracy", "exact_match", "targets"):
            assert measured[name] == said[step][f"eval_{name}"], name
    assert found(str(run), "--sequences", "2", log=tmp_path / "two")["sequences"] == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_the_exported_folder_measure_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    world_size, settings = LAYOUTS[name]
    run, rows = folder / "runs" / "parity", str(folder / "rows.jsonl")
    one = found(str(run), rows, log=tmp_path / "one")
    other = found(str(run), rows, *(f"--set={setting}" for setting in settings), world_size=world_size, log=tmp_path / "other")
    exported = found(str(run / "export"), rows, "--set=data.task=sft", "--set=data.seq_len=64", log=tmp_path / "exported")
    assert other["layout"] == ({"dp": 2} if name == "dp2" else {"tp": 2} | ({"pp": 2} if "pp2" in name else {}))
    for measured in (other, exported):
        assert measured["loss"] == pytest.approx(one["loss"], rel=RELATIVE, abs=ABSOLUTE)
        for share in ("accuracy", "exact_match", "targets", "sequences"):
            assert measured[share] == one[share], share


def test_an_answer_counts_as_right_where_greedy_decoding_writes_it(folder: Path, tmp_path: Path) -> None:
    run = folder / "runs" / "parity"
    model, tokenizer = load_folder(run / "export")
    right = 0
    for row in ROWS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            written = model.generate(prompt["input_ids"], max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text.strip() == row["completion"]
    measured = found(str(run), str(folder / "rows.jsonl"), "--set=train.eval_sequences=1", log=tmp_path / "log")
    assert measured["sequences"] > 1, "a file is read whole, however much a run evaluates of what it holds out"
    assert right > 0
    assert measured["exact_match"] == right / len(ROWS)


def assert_measured_as_said(recipe: Path, run: Path, *settings: str) -> dict[str, Any]:
    """What is measured of the last checkpoint of two steps."""
    words = [f"--set={setting}" for setting in ("train.steps=2", "train.eval_every=2", "run.seed=3", *settings)]
    ended = run_ranks(train, [str(recipe), *words], world_size=1, log=recipe.parent / "train")
    assert ended.codes == (0,), ended.said
    (said,) = read_metrics(run / "evaluations.jsonl")
    measured = found(str(run), log=recipe.parent / "eval")
    for name, value in said.items():
        if name.startswith("eval_"):
            assert measured[name.removeprefix("eval_")] == value, name
    return measured


TEXTS = ["def add(a, b):\n    return a + b\n", "größer als — é", "x", "四 🙂 " * 9]


@pytest.mark.parametrize("opening", [False, True], ids=["plain", "opened"])
def test_bits_per_byte_are_those_of_transformers_own_losses(opening: bool, tmp_path: Path) -> None:
    """A text's first token has nothing before it, unless it is opened: it is counted at the mean of the others."""
    tokenizer = train_bpe(iter(TEXTS * 9), 290)
    config = LlamaConfig(vocab_size=291, **{**SIZES, "max_position_embeddings": 256}, **HEADS, initializer_range=0.5)
    tokenizer.save(tmp_path / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    if opening:
        add_opening(tmp_path / "model")
    model, theirs = load_folder(tmp_path / "model")
    nats, predicted, tokens = 0.0, 0, 0
    for text in TEXTS:
        ids = [*theirs(text)["input_ids"], theirs.eos_token_id]
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        nats, predicted = nats + float(loss) * (len(ids) - 1), predicted + len(ids) - 1
        tokens += len(ids) - opening
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    measured = found(
        str(tmp_path / "model"), str(tmp_path / "texts.jsonl"), "--set=data.seq_len=256", log=tmp_path / "log", world_size=2
    )
    bits = nats / predicted * tokens / math.log(2)
    assert measured["bits_per_byte"] == pytest.approx(bits / len("".join(TEXTS).encode()), rel=RELATIVE)
    assert (measured["targets"] == tokens) is opening


def add_opening(folder: Path) -> None:
    """Have a tokenizer write a token before each text, as that of Llama 3 does."""
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    bos = {**whole["added_tokens"][0], "id": 290, "content": "<s>"}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    whole["added_tokens"].append(bos)
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [290], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(whole))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token": "<s>"}))


def test_tokens_that_a_run_masked_are_masked_again(tmp_path: Path) -> None:
    recipe = write_bert_recipe(tmp_path, "mlm")
    measured = assert_measured_as_said(recipe, tmp_path / "runs" / "mlm", "data.eval_fraction=0.2")
    assert "bits_per_byte" not in measured, "most bytes of its texts are not predicted"


def test_an_adapter_is_measured_with_its_model_as_its_run_did(tmp_path: Path) -> None:
    """In half precision, its weights in four bits; of rows that name their fields, which a FILE is then taken to name alike."""
    rows = tmp_path / "named.jsonl"
    rows.write_text("".join(json.dumps({"asked": row["prompt"], "said": row["completion"]}) + "\n" for row in ROWS))
    path = write_recipe(tmp_path)
    recipe = json.loads(path.read_text())
    recipe["data"]["sources"] = [{"path": str(rows), "fields": {"prompt": "asked", "completion": "said"}}]
    recipe["model"]["config"]["hidden_size"] = 64  # inputs that are quantized together
    tuning = {"method": "lora", "quantize": "nf4"}
    path.write_text(json.dumps({**recipe, "tuning": tuning, "precision": {"dtype": "bf16"}}))
    run = tmp_path / "runs" / "parity"
    held_out = assert_measured_as_said(path, run)
    assert held_out["precision"] == "bf16"
    assert found(str(run), str(rows), log=tmp_path / "log")["sequences"] > held_out["sequences"]


def test_translations_score_as_they_did_at_the_end_of_the_run(tmp_path: Path) -> None:
    for name, numbers in (("rows", range(80)), ("held_out", range(8))):
        rows = [{"source": f"{n} is", "target": "odd" if n % 2 else "even"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        key: [{"path": str(tmp_path / f"{name}.jsonl")}] for key, name in (("sources", "rows"), ("eval_sources", "held_out"))
    }
    recipe: dict[str, Any] = {
        "run": {"name": "translator", "dir": str(tmp_path / "runs")},
        "model": {"family": "marian", "config": MARIAN},
        "data": {"task": "translate", **files, "seq_len": 32, "workers": 1},
        "batch": {"global_sequences": 4, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "train": {"eval_translations": 8, "beams": 1},
    }
    path, run = tmp_path / "recipe.json", tmp_path / "runs" / "translator"
    path.write_text(json.dumps(recipe))
    measured = assert_measured_as_said(path, run)
    summary = json.loads((run / "summary.json").read_text())
    assert measured["translations"] == 8
    assert measured["chrf"] > 0
    assert {name: measured[name] for name in ("bleu", "chrf", "sacrebleu")}.items() <= summary.items()


def test_a_classifier_shows_which_classes_it_takes_for_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_bert_recipe(tmp_path, "classify")
    run, rows = tmp_path / "runs" / "classify", str(tmp_path / "rows.jsonl")
    assert_measured_as_said(recipe, run, "data.eval_fraction=0.2")
    measured = found(str(run), rows, log=tmp_path / "eval")
    confusion = measured["confusion"]
    assert [sum(row.values()) for row in confusion.values()] == [60, 60]
    assert measured["accuracy"] == (confusion["even"]["even"] + confusion["odd"]["odd"]) / 120
    # Nothing is dropped, so a network that has no dropout measures the same.
    config = run / "export" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **NO_DROPOUT}))
    exported = found(str(run / "export"), rows, log=tmp_path / "exported", world_size=2)
    assert exported["confusion"] == confusion
    assert exported["loss"] == pytest.approx(measured["loss"], rel=RELATIVE)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("nowhere",), "WEIGHTS nowhere: no checkpoint there; legal: a Hugging Face folder, a checkpoint's folder, or a run's"),
        (("{run}", "{run}/no.jsonl"), 'no.jsonl" does not exist'),
        (("{run}", "--set=parallel.tensor=4"), "world size 2 (RANK="),
        (("{run}", "--set=model.tensors=3"), "model.tensors"),
        (("{run}", "--set=data.task=preference"), "compares with the model before training, which no checkpoint has"),
        pytest.param(  # which lists thousands of tasks
            ("{run}", "--harness", "no_such_task"), "--harness no_such_task: no such task", marks=pytest.mark.grid
        ),
        (("{run}", "--target", "x"), "--target is the other side of one FILE, not of 0"),
        (("{run}", "--chat"), "--chat is used only with --harness"),
        (("{run}", "--harness", "x", "--translations", "3"), "--harness brings its own data: remove --translations"),
    ],
)
def test_what_is_wrong_is_said_once(words: tuple[str, ...], line: str, folder: Path, tmp_path: Path) -> None:
    if "--harness" in words:
        pytest.importorskip("lm_eval")
    run = str(folder / "runs" / "parity")
    ended = ask(*(word.replace("{run}", run) for word in words), log=tmp_path, world_size=2)
    assert set(ended.codes) == {78}, ended.said
    assert line in ended.said
    assert "Traceback" not in ended.said


TASKS = {
    "sides": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": ["even", "odd", "neither of them"],
        "doc_to_target": "{{completion}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    },
    "words": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}} {{completion}}, and so it has been for as long as anybody remembers or has cared to ask.",
        "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.mark.parametrize("chat", [pytest.param(False, marks=pytest.mark.grid), True])
def test_the_harness_gives_what_it_gives_of_the_exported_folder(chat: bool, folder: Path, tmp_path: Path) -> None:
    """Its own model of transformers is the oracle; the text is longer than the model has positions."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    run = folder / "runs" / "parity"
    words = [word for name in TASKS for word in ("--harness", name)]
    ours = found(
        *(str(run), *words, "--harness-path", str(tmp_path), "--sequences", "12", "--set=parallel.tensor=2"),
        *(["--chat"] if chat else []),
        log=tmp_path / "log",
        world_size=4,
    )["tasks"]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(run / "export"), "dtype": "float32", "device": "cpu"},
        tasks=list(TASKS),
        limit=12,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=chat,
    )["results"]
    for name in TASKS:
        for metric in ("acc,none", "acc_norm,none", "byte_perplexity,none", "exact_match,none"):
            if metric in theirs[name]:
                assert ours[name][metric] == pytest.approx(theirs[name][metric], rel=RELATIVE), (name, metric)
