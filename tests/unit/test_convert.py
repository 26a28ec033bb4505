"""`triaxis convert`: other tools' configs become recipes that `check` accepts, and nothing of them is lost in silence."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.convert.draft import Draft
from trainer.convert.reading import read_mapping
from trainer.convert.rows import ABSENT, same_value
from trainer.convert.schema_keys import schema_has
from trainer.convert.tools import TOOLS, converted, recipe_of, recognised
from trainer.convert.trainer_arguments import ROWS
from trainer.recipe import known_keys, load

SAMPLES = Path(__file__).parent / "foreign"
FILES = {
    "ds_cosine_bf16.json": "deepspeed",
    "ds_fp16_zero2.json": "deepspeed",
    "ds_zero3_offload.json": "deepspeed",
    "llamafactory_dpo.yaml": "llamafactory",
    "llamafactory_pretrain_qlora.yaml": "llamafactory",
    "llamafactory_sft_full.yaml": "llamafactory",
    "axolotl_dpo.yml": "axolotl",
    "axolotl_pretrain.yml": "axolotl",
    "axolotl_qlora.yml": "axolotl",
    "recipe.yaml": "recipe",
}
# Keys that a later version of the recipe has: until then a row of theirs leads nowhere.
AWAITED = {"schedule.warmup_ratio", "train.epochs", "train.patience", "checkpoint.best", "data.max_rows", "data.chat_template"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the samples and what they name."""
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(name: str, *words: str) -> dict[str, Any]:
    """Return the recipe that the command writes for a file."""
    assert main(["convert", name, "out.json", "--replace", *words]) == 0
    return dict(json.loads(Path("out.json").read_text()))


def test_every_sample_has_a_row_above() -> None:
    assert {path.name for path in SAMPLES.iterdir() if path.is_file()} == {*FILES}


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_of_every_sample_passes_check(name: str, folder: Path) -> None:
    convert(name)
    load("out.json")


@pytest.mark.parametrize("name", [name for name, kind in FILES.items() if kind in TOOLS])
def test_every_key_of_every_sample_is_brought_or_listed(name: str, folder: Path) -> None:
    """A key that no row and no rule looks at would be ignored in silence."""
    given = read_mapping(Path(name))
    assert recognised(given) == FILES[name]
    draft = converted(given, TOOLS[FILES[name]], world_size=1, folder=folder)
    for key, value in draft.given.items():
        row = draft.tool.rows.get(key)
        assert key in draft.asked or (row is not None and row.why and row.asks_for_nothing(value)), key


# ---------------------------------------------------------------------------------------------------- what they become


def test_llamafactory_becomes_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = convert("llamafactory_sft_full.yaml", "--world-size", "4")
    assert recipe["model"] == {"from_pretrained": "Qwen/Qwen3-4B-Instruct-2507"}
    assert recipe["run"] == {"name": "sft", "dir": "saves/qwen3-4b/full", "seed": 7}
    assert recipe["batch"] == {"micro_sequences": 2, "global_sequences": 2 * 4 * 4}
    assert recipe["data"]["sources"] == [
        {"path": "data/identity.json"},
        {"path": "data/chats.jsonl"},
        {"path": "openai/gsm8k", "split": "test", "fields": {"instruction": "question", "output": "answer"}},
    ]
    betas = {"betas": [0.9, 0.999], "eps": 1e-8}
    assert recipe["optimizer"] == {"name": "adamw", "lr": 1e-5, "weight_decay": 0.01, **betas}
    warmup = {"warmup_ratio": 0.1} if schema_has("schedule.warmup_ratio") else {"warmup_steps": 100}
    assert recipe["schedule"] == {"name": "cosine", "min_lr_ratio": 0.1, **warmup}
    assert recipe["train"]["steps"] == 1000
    assert recipe["train"]["recompute"] == "full"  # it recomputes unless it is told not to
    assert recipe["zero"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert recipe["tracking"] == {"wandb": {"mode": "online"}, "tensorboard": True}
    said = capsys.readouterr().err
    assert (
        "batch.global_sequences             32  <- per_device_train_batch_size 2 × gradient_accumulation_steps 4 × 4 ranks"
        in said
    )
    assert 'optim = "adamw_8bit": its states are fp32 here' in said
    assert "ds_zero3_offload.json: zero_optimization.stage3_gather_16bit_weights_on_model_save = true: checkpoints are" in said


def test_axolotl_becomes_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = convert("axolotl_dpo.yml")
    assert recipe["data"]["task"] == "preference"
    assert recipe["preference"] == {"loss": "dpo", "beta": 0.2}
    assert recipe["tuning"]["targets"] == ["q", "k", "v", "o"]
    assert (recipe["tuning"]["method"], recipe["tuning"]["quantize"]) == ("lora", "int8")
    said = capsys.readouterr().err
    assert "nonsense = 1: is no key of axolotl that is known here" in said
    assert 'lora_modules_to_save = ["embed_tokens", "lm_head"]: only the rows of data.new_tokens are trained' in said
    assert "eval_steps 50: nothing is held out to evaluate: set data.eval_fraction or data.eval_sources too" in said
    qlora = convert("axolotl_qlora.yml")
    assert qlora["tuning"] == {
        **{"method": "lora", "targets": ["attention", "mlp"], "rank": 32, "alpha": 16, "dropout": 0.05, "quantize": "nf4"},
    }
    assert qlora["tracking"]["wandb"] == {"mode": "online", "project": "mine"}


def test_deepspeed_becomes_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = convert("ds_fp16_zero2.json")
    assert recipe["batch"] == {"micro_sequences": 4, "global_sequences": 64}
    assert recipe["precision"]["loss_scale"] == {"initial_power": 12, "window": 500, "hysteresis": 2, "minimum": 1}
    assert recipe["schedule"] == {"name": "linear", "min_lr_ratio": 0.0, "warmup_steps": 100}
    said = capsys.readouterr().err
    assert 'elasticty = {"enabled": true}: is no key of DeepSpeed' in said
    assert "ratio = 0.5: it needs DeepSpeed's own CPU Adam" in said
    assert "model.from_pretrained: the file names no model" in said


def test_a_recipe_in_yaml_is_the_same_recipe(folder: Path) -> None:
    assert convert("recipe.yaml")["optimizer"] == {"lr": 1e-3}  # a text to PyYAML, a number to YAML 1.2


# ------------------------------------------------------------------------------------------- transformers' own arguments


def arguments(**keys: Any) -> dict[str, Any]:
    """The arguments that transformers itself writes."""
    from transformers import TrainingArguments

    return dict(json.loads(TrainingArguments(output_dir="out/first", **keys).to_json_string()))


def of_arguments(given: dict[str, Any]) -> Draft:
    return converted(given, TOOLS["trainer"], world_size=1, folder=Path())


def test_the_defaults_of_transformers_miss_nothing() -> None:
    """Each default of the table is that of the real class: so what was not changed is not listed."""
    draft = of_arguments(arguments())
    assert [str(remark) for remark in draft.missed] == []
    assert draft.values["optimizer.lr"] == 5e-5
    assert draft.values["schedule.name"] == "linear"
    rows = TOOLS["trainer"].rows
    unknown = [key for key in arguments() if not any(row == key or row.startswith(f"{key}.") for row in rows)]
    assert unknown == []


def test_every_default_of_the_table_is_the_one_of_the_class() -> None:
    theirs = arguments()
    wrong = {
        name: (row.default, theirs[name])
        for name, row in ROWS.items()
        if name in theirs and row.default is not ABSENT and not same_value(row.default, theirs[name])
    }
    assert wrong == {}


def test_arguments_of_transformers_become_what_they_say() -> None:
    given = arguments(
        max_steps=50, warmup_steps=0.1, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 5e-6},
        per_device_train_batch_size=2, gradient_accumulation_steps=8, save_strategy="no", eval_strategy="steps",
        eval_steps=10, report_to=["wandb", "mlflow"], neftune_noise_alpha=5, optim="paged_adamw_8bit", run_name="mine",
    )  # fmt: skip
    draft = of_arguments(given)
    recipe = recipe_of(draft)
    assert recipe["train"]["steps"] == 50
    assert recipe["train"]["eval_every"] == 10
    warmup = {"warmup_ratio": 0.1} if schema_has("schedule.warmup_ratio") else {"warmup_steps": 5}
    assert recipe["schedule"] == {"name": "cosine", "min_lr_ratio": 0.1, **warmup}
    assert recipe["batch"] == {"micro_sequences": 2, "global_sequences": 16}
    assert recipe["checkpoint"]["every"] == 0
    assert recipe["run"]["name"] == "first"
    missed = "\n".join(map(str, draft.missed))
    assert "neftune_noise_alpha = 5: noise on embeddings is not there" in missed
    assert 'optim = "paged_adamw_8bit": its states are fp32 here' in missed
    assert "there is no mirror of metrics.jsonl in mlflow" in missed
    assert "run_name" in missed


# -------------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("tool", TOOLS)
def test_every_row_leads_to_a_key_or_says_why_not(tool: str) -> None:
    sections = {key.rpartition(".")[0] for key in known_keys()}
    for name, row in TOOLS[tool].rows.items():
        assert bool(row.why) or bool(row.to) or name == "special_tokens.pad_token", name
        assert row.to == "" or row.to in {*known_keys(), *sections, *AWAITED}, (name, row.to)
        assert not row.why or row.why[0].islower() or not row.why[0].isalpha() or row.why.split()[0] in PROPER, row.why


PROPER = {"Triaxis", "DeepSpeed", "W&B", "W&B's", "HF_HOME", "HF_TOKEN", "DS_ACCELERATOR=cpu"}


def test_the_guide_has_what_the_tables_have() -> None:
    page = (Path(__file__).parents[2] / "ds_configs" / "README.md").read_text(encoding="utf-8")
    head = "| key | DeepSpeed | transformers | LLaMA-Factory | axolotl |\n"
    rows = page.partition(head)[2].partition("\n\n")[0].splitlines()[1:]
    assert len(rows) > 25
    for row in rows:
        ours, *theirs = re.findall(r"(?<=\| )[^|]+(?= \|)", row)
        for tool, cell in zip(TOOLS.values(), theirs, strict=True):
            for word in re.findall(r"`(.+?)`", cell):
                key = ours.strip("`")
                known = [row for name, row in tool.rows.items() if f".{name}".endswith(f".{word}")]
                leads = any(row.to == key or (row.joint and row.to.partition(".")[0] == key.partition(".")[0]) for row in known)
                assert leads or word in OBJECTS, (word, key)


# Objects of DeepSpeed that are entered, and keys that set several of ours at once.
OBJECTS = {"optimizer", "scheduler", "rl"}


def test_a_key_that_is_there_is_awaited_no_longer() -> None:
    assert not schema_has("train.stepz")
    assert schema_has("train.steps")
    assert schema_has("checkpoint.async")
    assert schema_has("tracking.wandb.mode")


# ---------------------------------------------------------------------------------------------------------- the command


def test_nothing_is_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text("mine")
    assert main(["convert", "axolotl_dpo.yml", "mine.json"]) == 78
    assert "mine.json is there already, and is not overwritten: name another file, or give --replace" in capsys.readouterr().err
    assert Path("mine.json").read_text() == "mine"
    assert main(["convert", "axolotl_dpo.yml", "mine.json", "--replace"]) == 0
    assert main(["convert", "axolotl_dpo.yml"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("mine.json").read_text())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yml", "base_model: [1", "a.yml:1:15: not YAML"),
        ("a.yml", "base_model: a\nbase_model: b\n", "key base_model is given twice in the object of line 1: remove one"),
        ("a.yml", "!!python/object/apply:os.system [ls]", "not YAML (could not determine a constructor"),
        ("a.yml", "- 1\n", "a.yml: holds no keys: a config is one object"),
        ("a.yml", "just a text", "a.yml: holds no keys"),
        ("a.json", '{"a": 1, "a": 2}', "a.json: key a is given twice: remove one"),
        ("a.json", '{"a": 1,}', "a.json:1:9: not JSON"),
        ("a.json", '{"zzz": 1}', "no tool that is known here has one of its keys; say whose it is: --from deepspeed"),
        ("a.yml", "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 20000 values: not a config"),
        ("a.yml", "a: &a [*a]", "more than 20000 values"),
        ("a.yml", "[" * 1500, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(
    name: str, text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text(text)
    assert main(["convert", name]) in (65, 78)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_values_that_are_none_are_listed_and_the_rest_is_brought(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yml").write_text(
        "base_model: a/b\nlearning_rate: fast\nlora_r: 8\nseed: -3\nsequence_len: 1.5\nlr_scheduler: wild\n"
        "adapter: prefix\nload_in_4bit: true\ndatasets: [{path: x/y, type: strange, shards: 4}]\nhf_use_auth_token: true\n"
    )
    assert main(["convert", "a.yml", "out.json"]) == 0
    said = capsys.readouterr().err
    for line in (
        'learning_rate = "fast": it is not a number',
        "seed = -3: run.seed must be greater than or equal to 0, not -3",
        "sequence_len = 1.5: it is not a whole number",
        'lr_scheduler = "wild": it is none of linear, cosine',
        'adapter = "prefix": tuning.method has lora, dora',
        "load_in_4bit true: tuning.quantize is used only with tuning.method",
        "lora_r 8: tuning.rank is used only with tuning.method",
        'datasets[0].type = "strange": rows of this type are not known here',
        "datasets[0].shards = 4: all rows of a source are read",
    ):
        assert line in said
    assert "tuning" not in json.loads(Path("out.json").read_text())


def test_what_check_would_refuse_is_written_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yml").write_text("base_model: a/b\ndatasets: [{path: gone/rows.jsonl, type: alpaca}]\n")
    assert main(["convert", "a.yml", "out.json"]) == 78
    said = capsys.readouterr().err
    assert "`triaxis check` refuses the recipe until this is mended" in said
    assert 'data.sources[0].path = "gone/rows.jsonl" does not exist' in said
    assert Path("out.json").is_file()


@pytest.mark.parametrize("name", ["recipe.yaml", "a name.yml", "recipe.txt"])
def test_a_recipe_in_yaml_is_answered_with_the_command_that_converts_it(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("recipe.yaml").read_text()
    Path(name).write_text(text)
    Path(name).with_suffix(".json").write_text("mine")  # a name that is taken is not suggested
    assert main(["check", name]) == 78
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    said, command = error.strip().split(": triaxis ")
    assert said == f"triaxis: error: {name} is YAML, and a recipe is JSON"
    assert main(shlex.split(command)) == 0
    assert main(["check", shlex.split(command)[-1]]) == 0
    Path("top.json").write_text(json.dumps({"extends": name}))
    assert main(["check", "top.json"]) == 78
    assert "is YAML, and a recipe is JSON" in capsys.readouterr().err


def test_a_config_of_another_tool_is_answered_with_the_command_that_converts_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "ds_fp16_zero2.json"]) == 78
    first, *_ = capsys.readouterr().err.splitlines()
    said = "triaxis: error: ds_fp16_zero2.json is a config of DeepSpeed, and no recipe: triaxis "
    assert first == f"{said}convert ds_fp16_zero2.json recipe.json"
    Path("faulty.json").write_text('{"model": {"family": "gpt2"}, "learning_rate": 1}')
    assert main(["check", "faulty.json"]) == 78
    assert "is a config of" not in capsys.readouterr().err


def test_secrets_are_not_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yml").write_text("base_model: a/b\ncomet_api_key: 0123456789abcdef\ndatasets: [{path: x/y, type: alpaca}]\n")
    main(["convert", "a.yml"])
    captured = capsys.readouterr()
    assert "comet_api_key" in captured.err
    assert "0123456789abcdef" not in captured.err + captured.out
