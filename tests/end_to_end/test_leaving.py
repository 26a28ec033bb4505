"""What leaves a run: its card, a folder in the place of another, and the upload to a stand-in for the hub."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.hub import READS, WRITES, Hub, Repo, stand_in
from tests.end_to_end.runs import start, write_bert_recipe, write_recipe
from trainer import cli

# huggingface_hub 2.4 and peft 0.21 ask their neighbours by names that are going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 6
MARIAN = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
}
SECRET = "hf_abcdefghijklmnopqrstuvwx"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of the recipe in its parent's parent, and what the run printed."""
    folder = tmp_path_factory.mktemp("leaving")
    path = write_recipe(folder, train__steps=STEPS, train__eval_every=2, checkpoint__every=3)
    recipe = json.loads(path.read_text())
    recipe |= {"description": f"A small model. Its token was {SECRET}."}
    recipe["model"]["license"] = "apache-2.0"
    path.write_text(json.dumps(recipe))
    done = start(sys.executable, "-m", "trainer", "train", str(path), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "small", done.stdout


@pytest.fixture
def run(trained: tuple[Path, str]) -> Path:
    return trained[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose address and token a user would give in HF_ENDPOINT and HF_TOKEN."""
    from huggingface_hub import constants

    with stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's other store speaks a protocol of its own
        monkeypatch.setenv("HF_TOKEN", WRITES)
        yield hub


def card_of(folder: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard((folder / "README.md").read_text())


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("triaxis: error: ")


# -------------------------------------------------------------------------------------------------------------- the card


def test_the_card_of_a_run_says_what_it_is(run: Path) -> None:
    card = card_of(run / "export")
    assert card.data.license == "apache-2.0"
    front = card.data.to_dict()
    assert (front["pipeline_tag"], front["library_name"], card.data.base_model) == ("text-generation", "transformers", None)
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["loss"] == last["eval_loss"]
    assert found["perplexity"] == last["eval_perplexity"]
    assert {result.dataset_name for result in card.data.eval_results} == {"corpus.jsonl"}
    assert f"| tokens | {STEPS * 8 * 64:,} |" in card.text
    assert re.search(r"`[^`]*corpus.jsonl` \| train \| 2\d\d documents \| [\d,]+ \|", card.text)
    assert "[redacted]" in card.text
    assert SECRET not in card.text


def test_the_recipe_in_the_card_trains_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```json\n(.*?)```", card_of(run / "export").text, re.DOTALL)
    assert found
    (tmp_path / "recipe.json").write_text(found[1])
    values = []
    for recipe in (tmp_path / "recipe.json", run.parents[1] / "recipe.json"):
        assert cli.main(["check", str(recipe), "--json"]) == 0
        checked = json.loads(capsys.readouterr().out)["values"]
        values.append({key: entry["value"] for key, entry in checked.items() if key != "description"})
    assert values[0] == values[1]


def test_export_writes_the_card_of_its_step(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text as the run's own, but for its name; of an earlier step the figures of that step."""
    newest, earlier = tmp_path / "newest", tmp_path / "earlier"
    assert cli.main(["export", str(run), str(newest)]) == 0
    assert f'next: triaxis generate {newest} --prompt "…"' in capsys.readouterr().out
    own = (run / "export" / "README.md").read_text()
    assert (newest / "README.md").read_text() == own.replace(str(run / "export"), str(newest))
    assert cli.main(["export", str(run / "checkpoints" / "step-00000003"), str(earlier), "--license", "mit"]) == 0
    card = card_of(earlier)
    assert card.data.license == "mit"
    assert "| steps | 3 |" in card.text
    records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    (loss,) = (r.metric_value for r in card.data.eval_results if r.metric_type == "loss")
    assert loss == next(record["eval_loss"] for record in records if record["step"] == 2)


def test_a_run_names_its_report_and_the_next_command(trained: tuple[Path, str]) -> None:
    run, printed = trained
    assert f"report: {run / 'report.html'}\n" in printed
    assert printed.endswith(f'next: triaxis generate {run / "export"} --prompt "…"\n')


def test_a_checkpoint_without_its_run_has_a_card(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "elsewhere" / "one")
    assert cli.main(["export", str(tmp_path / "elsewhere" / "one"), str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert card.data.eval_results is None
    assert "corpus.jsonl`" in card.text


def of_kind(task: str, folder: Path) -> Path:
    """Write a recipe of a small run of the task."""
    if task in ("classify", "mlm"):
        return write_bert_recipe(folder, task)
    texts = [(f"the house {i} is red", f"das Haus {i} ist rot") for i in range(200)]
    if task == "translate":
        for side, name in enumerate(("t.en", "t.de")):
            (folder / name).write_text("\n".join(text[side] for text in texts))
        sources = [{"path": str(folder / "t.en"), "target_path": str(folder / "t.de")}]
        keys = {"data__eval_sources": sources, "train__eval_translations": 3, "train__sample_prompt": None}
        keys |= {"model__family": "marian", "model__config": MARIAN, "data__eval_fraction": 0.0}
    else:
        rows = [{"messages": [turn("user", english), turn("assistant", german)]} for english, german in texts]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources, keys = [{"path": str(folder / "chats.jsonl")}], {}
    return write_recipe(folder, data__task=task, data__sources=sources, **keys)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("task", "pipeline_tag", "used_by", "measure"),
    [
        ("classify", "text-classification", "eval", "accuracy"),
        ("mlm", "fill-mask", "eval", "perplexity"),
        ("sft", "text-generation", "chat", "exact_match"),
        ("translate", "translation", "generate", "bleu"),
    ],
)
def test_the_code_of_a_card_loads_every_kind_of_model(
    task: str, pipeline_tag: str, used_by: str, measure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = of_kind(task, tmp_path)
    words = ("train", str(recipe), "--run-dir", "run", "--set", "train.steps=2", "--set", "train.eval_every=1")
    extra = ("--set", "data.eval_fraction=0.1") if task in ("classify", "mlm") else ()
    done = start(sys.executable, "-m", "trainer", *words, *extra, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"next: triaxis {used_by} run/export" in done.stdout
    export = tmp_path / "run" / "export"
    card = card_of(export)
    assert card.data.pipeline_tag == pipeline_tag
    assert measure in {result.metric_type for result in card.data.eval_results}
    assert ("BLEU and chrF are those of sacreBLEU: `BLEU nrefs:1|" in card.text) == (task == "translate")
    (tmp_path / "load.py").write_text(code_of(export))
    asked = start(sys.executable, "load.py", cwd=tmp_path)
    assert (asked.returncode, bool(asked.stdout)) == (0, True), asked.stderr


# --------------------------------------------------------------------------------------------------- an adapter's base


def test_an_adapter_names_its_base_by_what_it_was_loaded_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe gives the base by a relative path; the adapter is loaded, by its card's code, from another folder."""
    shutil.copytree(run / "export", tmp_path / "base")
    shutil.copyfile(run.parents[1] / "corpus.jsonl", tmp_path / "corpus.jsonl")
    recipe = {
        "run": {"name": "tuned"},
        "model": {"from_pretrained": "base"},
        "data": {"sources": [{"path": "corpus.jsonl"}], "tokenizer": "base", "seq_len": 64},
        "tuning": {"method": "lora", "rank": 2},
        "train": {"steps": 2},
    }
    (tmp_path / "tuned.json").write_text(json.dumps(recipe))
    done = start(sys.executable, "-m", "trainer", "train", "tuned.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["export", str(tmp_path / "runs" / "tuned"), "adapter", "--push", "tuned"]) == 0
    assert f"the base of this adapter is a folder of this machine, {tmp_path / 'base'}" in capsys.readouterr().out
    for folder in (Path("adapter"), tmp_path / "runs" / "tuned" / "export"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert card_of(Path("adapter")).data.to_dict()["library_name"] == "peft"
    downloaded(hub, "ada/tuned", Path.cwd())
    loaded: dict[str, Any] = {}
    exec(code_of(Path("ada/tuned")), loaded)
    assert type(loaded["model"]).__name__ == "PeftModelForCausalLM"


# ------------------------------------------------------------------------------------------------------------- --replace


def test_replace_puts_one_export_in_the_place_of_another(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(run / "checkpoints" / "step-00000003"), str(out)]) == 0
    assert cli.main(["export", str(run), str(out), "--replace"]) == 0
    assert card_of(out).data.get("triaxis")["step"] == STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_but_an_export_is_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(run), str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["export", str(run), str(out)]) == 78
    assert said(capsys).endswith("give a new folder, or --replace if it is an export")
    (out / "notes.txt").write_text("mine")
    assert cli.main(["export", str(run), str(out), "--replace"]) == 78
    assert "also holds notes.txt, not of the export" in said(capsys)
    (out / "notes.txt").unlink()
    (out / "README.md").write_text("---\ntags: [triaxis\n---\nA card that is no YAML.")
    assert cli.main(["export", str(run), str(out), "--replace"]) == 78
    assert "is no export with a card of triaxis" in said(capsys)
    assert (out / "model.safetensors").exists()


def test_an_export_that_fails_leaves_the_old_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(run), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.checkpoint.model_card.write_card", full)
    capsys.readouterr()
    assert cli.main(["export", str(run), str(out), "--replace", "--dtype", "bf16"]) == 78
    assert "No space left on device" in said(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------------- --push


def downloaded(hub: Hub, name: str, root: Path) -> Path:
    """Write the files of a repository into the folder root/OWNER/NAME."""
    folder = root / name
    for file, content in hub.repos[name].files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def test_a_pushed_model_is_one_private_commit_that_loads(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(run), str(out), "--push", "small"]) == 0
    printed = capsys.readouterr()
    assert f"pushed to {hub.url}/ada/small (private), in one commit" in printed.out
    assert WRITES not in printed.out + printed.err
    repo = hub.repos["ada/small"]
    assert repo.private
    ((message, files),) = repo.commits
    assert message == f"small, step {STEPS}"
    assert files.keys() - {".gitattributes"} == {path.name for path in out.iterdir()}
    assert "PUT /storage/" in "".join(call[:13] for call in hub.asked)  # the weights went apart
    downloaded(hub, "ada/small", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(code_of(Path("ada/small")), {})
    assert capsys.readouterr().out.startswith("Once")


def test_a_repository_with_files_is_replaced_only_when_asked(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["bob/old"] = Repo(private=False, files={".gitattributes": b"", "old.bin": b"old", "config.json": b"{}"})
    words = ["export", str(run), str(tmp_path / "out"), "--push", "bob/old"]
    assert cli.main(words) == 78
    assert said(capsys).startswith("--push bob/old: it holds old.bin and 1 more already: give another name, or --replace")
    assert cli.main([*words, "--replace"]) == 78
    assert "it is public: add --public" in said(capsys)
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--replace", "--public", "--message", "The second try"]) == 0
    ((message, files),) = hub.repos["bob/old"].commits
    assert message == "The second try"
    assert files.keys() == {".gitattributes", *(path.name for path in (tmp_path / "out").iterdir())}


def test_what_is_known_before_stops_before_anything_is_written(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    words = ["export", str(run), str(tmp_path / "out"), "--push", "small"]
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    wrong = "hf_wrong0000000000000000000000000"
    for token, told in (("", "no token: set HF_TOKEN"), (wrong, "does not know the token"), (READS, "of ada may only read")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert cli.main(words) == 78
        line = said(capsys)
        assert told in line
        assert "hf_w" not in line
    monkeypatch.setenv("HF_TOKEN", WRITES)
    assert cli.main([*words[:-1], "no name"]) == 78
    assert "give NAME or OWNER/NAME" in said(capsys)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens at the port of "discard"
    assert cli.main(words) == 78
    assert said(capsys) == "--push small: the hub cannot be reached (ConnectError): look at the network"
    assert not (tmp_path / "out").exists()
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        ({"forbidden": {"ada/small"}}, "the token may not write there (You don't have the rights to create"),
        ({"broken": "/api/models/ada/small/commit"}, "the hub answered 500 (the disk of the hub is full)"),
        ({"broken": "/api/validate-yaml"}, "the hub answered 500 (the disk of the hub is full)"),
    ],
)
def test_a_push_that_fails_shows_nothing_there_and_keeps_the_folder(
    prepare: dict[str, Any], told: str, run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(hub).update(prepare)
    out = tmp_path / "out"
    words = ["export", str(run), str(out), "--push", "small"]
    assert cli.main(words) == 78
    line = said(capsys)
    assert told in line
    assert line.endswith(f"{out} is whole: the same command with --replace tries again")
    assert all(not repo.commits for repo in hub.repos.values())
    hub.forbidden, hub.broken = set(), ""
    assert cli.main([*words, "--replace"]) == 0
    assert len(hub.repos["ada/small"].commits) == 1


def test_an_unknown_licence_is_the_hub_s_word(run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--push", "small", "--license", "mine"]) == 78
    assert '"license" must be one of' in said(capsys)
    assert cli.main(["export", str(run), str(tmp_path / "other"), "--license", "Apache 2.0"]) == 78
    assert "'Apache 2.0' is no identifier of the hub, such as apache-2.0" in said(capsys)


@pytest.mark.grid
def test_the_environment_says_where_the_hub_is(run: Path, tmp_path: Path) -> None:
    with stand_in() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITES, "HF_HUB_DISABLE_XET": "1"}
        command = (sys.executable, "-m", "trainer", "export", str(run), "out", "--push", "ada/small")
        done = start(*command, cwd=tmp_path, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(hub.repos["ada/small"].commits) == 1
