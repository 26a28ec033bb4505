import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import cli
from trainer.recipe import load

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "ds_configs").glob("*.json"))
QUICKSTART = str(ROOT / "ds_configs" / "quickstart.json")
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "numpy", "tokenizers", "wandb", "tensorboard", "matplotlib")


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_check(recipe: Path) -> None:
    degrees = load(recipe).recipe.parallel
    replica = degrees.tensor * degrees.pipeline * degrees.context
    done = python("-m", "trainer", "check", str(recipe), "--world-size", str(replica))
    assert (done.returncode, done.stderr) == (0, "")


def test_recipes_describe_themselves_and_are_listed() -> None:
    listed = (ROOT / "ds_configs" / "README.md").read_text()
    for recipe in RECIPES:
        description = json.loads(recipe.read_text())["description"]
        assert f"ds_configs/{recipe.name}" in description
        assert "deepspeed --" in description
        assert "torchrun" in description
        assert f"triaxis submit ds_configs/{recipe.name}" in description
        assert f"`{recipe.name}`" in listed


def test_check_imports_nothing_heavy() -> None:
    program = (
        "import sys; from trainer.cli import main; assert main(['check', sys.argv[1], '--world-size', '2']) == 0; "
        "assert main(['schema']) == 0; "
        f"loaded = [name for name in {HEAVY} if name in sys.modules]; sys.stderr.write(','.join(loaded))"
    )
    done = python("-c", program, QUICKSTART)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_cli_is_cheap() -> None:
    """Counted in modules, not seconds: pydantic and rich come only when a command runs."""
    program = "import sys, trainer.cli; sys.stderr.write(','.join({'pydantic', 'rich', 'torch'} & sys.modules.keys()))"
    assert python("-c", program).stderr == ""


def test_check_prints_values_model_and_deepspeed_s_dict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", QUICKSTART, "--world-size", "2", "--set", "run.name=x"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["run.name"][1:] == ['"x"', "--set"]
    assert rows["zero.stage"][1:3] == ["1", "file"]
    assert rows["train.log_every"][0] == "train.log_every"
    # 2048 · 128 tied embeddings + 4 layers of 4 · 128² + 3 · 128 · 352 + 2 · 128 + the last norm's 128
    assert "1,066,112 parameters" in out
    assert "data-parallel 2" in out
    assert '"train_batch_size": 4' in out


def test_check_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", QUICKSTART, "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved.keys() == {"values", "plan"}
    assert cli.main(["check", QUICKSTART, "--json", "--world-size", "2"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["deepspeed_config"]["zero_optimization"]["stage"] == resolved["values"]["zero.stage"]["value"] == 1


def test_values_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Neither rich's markup nor control characters of a recipe reach the terminal as commands."""
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"description": "[red]x[/red] \x1b[31m :smile:", "model": {"family": "gpt2"}}))
    assert cli.main(["check", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "[red]x[/red] \\u001b[31m :smile:" in out
    assert "\x1b" not in out


def test_version_names_what_it_stands_on_and_imports_none_of_it() -> None:
    import torch

    program = (
        "import sys; from trainer.cli import main; code = main(['--version']); "
        f"sys.stderr.write(','.join(name for name in {HEAVY} if name in sys.modules)); sys.exit(code)"
    )
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"triaxis \d+\.\d+\.\d+ \(torch \S+, deepspeed \S+, transformers \S+, Python \S+\)\n", done.stdout)
    assert f"torch {torch.__version__}," in done.stdout


def test_schema_is_json_with_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["Data"]["properties"]["seq_len"]["description"].endswith("[tokens].")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", QUICKSTART], "unknown command trian; did you mean train?; legal: train, check"),
        (["data", "inpsect"], "unknown command inpsect; did you mean inspect?"),
        (["check", QUICKSTART, "--wrold-size", "2"], "unknown argument --wrold-size; did you mean --world-size?"),
        (["train", QUICKSTART, "--world-size", "2"], "unknown argument --world-size (see"),
        (["check", QUICKSTART, "--world-size", "0"], "'0' is not a whole number of at least 1"),
        (["check", QUICKSTART, "extra"], "unknown argument extra"),
        (["check"], "the following arguments are required: RECIPE"),
        ([], "the following arguments are required: COMMAND"),
        (["check", "none.json"], "none.json: no such file"),
        (["check", QUICKSTART, "--world-size", "3"], "batch.global_sequences = 4 is not micro_sequences 2 × data-parallel 3"),
        (
            ["check", QUICKSTART, "--set", "train.stepz=3"],
            "--set train.stepz: unknown key train.stepz; did you mean train.steps?",
        ),
        (["generate", "f", "--prompt", "x", "--temperature", "-1"], "'-1' is not a number of at least 0"),
        (["generate", "f", "--prompt", "x", "--temperature", "nan"], "'nan' is not a number"),
        (["data", "inspect", "/nonexistent"], "/nonexistent: no tokenized data"),
    ],
)
def test_wrong_words_are_one_line_and_exit_78(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 78
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("triaxis: error: ")
    assert said in line


def test_a_bug_is_exit_70_with_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("trainer.recipe.load", broken)
    assert cli.main(["check", QUICKSTART]) == 70
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_failure() -> None:
    """`triaxis schema | head -1`: the pipe closes after the first line."""
    with subprocess.Popen(
        [sys.executable, "-m", "trainer", "schema"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=60) == 0
