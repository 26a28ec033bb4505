"""The defaults of a recipe that goes on from a pretrained model, as `triaxis check` shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from parallel.messages import Messages
from trainer.cli import main
from trainer.engine import compute_format
from trainer.fine_tuning import OF_LOSSES, OF_METHODS, OF_TASKS, Rates
from trainer.learning_rate import lr_at
from trainer.recipe import load
from trainer.schema import Preference, Recipe
from trainer.tasks import TASKS
from trainer.tuning.methods import METHODS

ROOT = Path(__file__).parents[2]
BOTH = "bf16 on a CUDA device of capability 8.0 or newer, fp32 elsewhere"
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "intermediate_size": 64}
BERT = {"model_type": "bert", **SIZES, "intermediate_size": 64}
MARIAN = {"model_type": "marian", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 300}
MARIAN |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
MARIAN |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
CONFIGS = {"translate": MARIAN, "mlm": BERT, "classify": BERT}
SOURCES: dict[str, list[dict[str, str]]] = {"translate": [{"path": "a.en", "target_path": "a.de"}]}
# lr, weight decay, warm-up, shape: as they are published, written once more
SFT, DPO, LORA = (2e-5, 0.0, 0.1, "cosine"), (5e-7, 0.0, 0.1, "cosine"), (2e-4, 0.0, 0.1, "cosine")
PUBLISHED: list[tuple[str, dict[str, Any], tuple[float, float, float, str]]] = [
    ("pretrain", {}, (5e-5, 0.0, 0.0, "linear")),
    ("sft", {}, SFT),
    ("translate", {}, (3e-5, 0.0, 0.0625, "linear")),
    ("mlm", {}, (1e-4, 0.0, 0.0, "linear")),
    ("classify", {}, (2e-5, 0.01, 0.1, "linear")),
    ("preference", {}, DPO),
    ("preference", {"preference": {"loss": "ipo"}}, DPO),
    ("preference", {"preference": {"loss": "orpo"}}, (5e-6, *DPO[1:])),
    ("pretrain", {"tuning": {"method": "lora"}}, LORA),
    ("sft", {"tuning": {"method": "lora", "quantize": "nf4"}}, LORA),
    ("sft", {"tuning": {"method": "dora"}}, LORA),
    ("sft", {"tuning": {"method": "adalora"}}, (5e-4, 0.0, 0.04, "linear")),
    ("sft", {"tuning": {"method": "ia3"}}, (3e-3, 0.0, 0.06, "linear")),
    ("sft", {"tuning": {"method": "adapter"}}, (3e-4, 0.01, 0.1, "linear")),
    ("mlm", {"tuning": {"method": "bitfit"}}, (1e-3, 0.0, 0.0, "constant")),
    ("preference", {"tuning": {"method": "lora"}}, (5e-6, *LORA[1:])),
    ("preference", {"tuning": {"method": "lora"}, "preference": {"loss": "orpo"}}, (5e-5, *LORA[1:])),
    ("preference", {"tuning": {"method": "ia3"}}, (7.5e-5, 0.0, 0.06, "linear")),
]
KEYS = ("optimizer.lr", "optimizer.weight_decay", "schedule.warmup_ratio", "schedule.name")
Check = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """What `triaxis check --json` shows of a recipe of a task that goes on from a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "a.en", "a.de"):
        Path(name).touch()

    def check(task: str = "sft", *options: str, **sections: Any) -> dict[str, dict[str, Any]]:
        Path("base").mkdir(exist_ok=True)
        Path("base", "config.json").write_text(json.dumps(CONFIGS.get(task, LLAMA)))
        data = {"task": task, "seq_len": 64, "sources": SOURCES.get(task, [{"path": "rows.jsonl"}])}
        recipe = {"model": {"from_pretrained": "base"}, "data": data, **sections}
        Path("r.json").write_text(json.dumps(recipe))
        assert main(["check", "r.json", "--json", *options]) == 0, capsys.readouterr().err
        shown: dict[str, dict[str, Any]] = json.loads(capsys.readouterr().out)
        return {**shown["values"], **{key: value for key, value in shown.items() if key != "values"}}

    return check


@pytest.mark.parametrize(("task", "sections", "expected"), PUBLISHED)
def test_each_task_and_method_has_its_own(check: Check, task: str, sections: dict[str, Any], expected: tuple[Any, ...]) -> None:
    values = check(task, **sections)
    assert tuple(values[key]["value"] for key in KEYS) == expected
    assert {values[key]["origin"] for key in (*KEYS, "precision.dtype", "schedule.min_lr_ratio")} == {"task default"}
    assert values["precision.dtype"] == {"value": None, "origin": "task default", "at_start": BOTH}
    assert values["schedule.min_lr_ratio"]["value"] == 0.0
    assert values["optimizer.betas"]["origin"] == "default"


def test_every_name_has_its_row_with_a_source() -> None:
    assert set(OF_TASKS) == {name for name, task in TASKS.items() if not task.compares}
    assert set(OF_LOSSES) == set(get_args(Preference.model_fields["loss"].annotation))
    assert set(OF_METHODS) == set(METHODS)
    described = Recipe.model_fields["optimizer"].annotation.model_fields["lr"].description  # type: ignore[union-attr]
    for rates in (*OF_TASKS.values(), *OF_LOSSES.values(), *OF_METHODS.values()):
        assert f"{rates.lr:g} [{rates.source}]" in described


@pytest.mark.parametrize(
    ("page", "rows"), [("model", {**OF_TASKS, **OF_LOSSES}), ("tuning", OF_METHODS)], ids=["model", "tuning"]
)
def test_the_guides_have_the_same_rates(page: str, rows: dict[str, Rates]) -> None:
    text = (ROOT / "trainer" / page / "README.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    found = {name: row[2:6] for row in cells if len(row) == 7 for name in re.findall(r"`(\w+)`", row[1])}
    for name, rates in rows.items():
        lr, decay, shape, warmup = found[name]
        assert (float(lr), float(decay), shape, float(warmup)) == (
            *(rates.lr, rates.weight_decay, f"`{rates.schedule}`", rates.warmup),
        ), name


def test_the_recipe_of_the_readme_fine_tunes_with_a_rate_of_fine_tuning(check: Check) -> None:
    """As the README says: give a folder instead of the family."""
    copied = json.loads(re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1])  # type: ignore[index]
    values = check("pretrain", **{**copied, "model": {"from_pretrained": "base"}, "data": {"seq_len": 512}})
    assert values["optimizer.lr"] == {"value": 5e-5, "origin": "task default"}
    assert values["precision.dtype"]["value"] != "fp32"


def test_what_is_written_stays(check: Check) -> None:
    values = check(
        optimizer={"lr": 0.5}, schedule={"name": "wsd", "warmup_steps": 3}, precision={"dtype": "fp16"}, train={"steps": 10}
    )
    assert values["optimizer.lr"] == {"value": 0.5, "origin": "file r.json"}
    assert values["optimizer.weight_decay"]["origin"] == "task default"
    assert values["precision.dtype"] == {"value": "fp16", "origin": "file r.json"}
    assert values["schedule.warmup_ratio"] == {"value": None, "origin": "default"}
    assert values["schedule.min_lr_ratio"] == {"value": 0.1, "origin": "default"}, "another shape has its own end"
    assert check("sft", "--set", "schedule.warmup_ratio=0.5")["schedule.warmup_ratio"]["origin"] == "--set"
    assert check(precision={"dtype": None})["precision.dtype"]["at_start"] == BOTH, "null is not written"


@pytest.mark.parametrize(
    ("name", "lr", "decay"), [("lion", 2e-6, 0.1), ("adam", 2e-5, 0.01), ("sgd", 1e-3, 0.01), ("adafactor", 1e-3, 0.01)]
)
def test_rates_of_adamw_are_those_of_other_rules_only_where_that_is_known(
    check: Check, name: str, lr: float, decay: float
) -> None:
    values = check("classify", optimizer={"name": name})
    assert (values["optimizer.lr"]["value"], values["optimizer.weight_decay"]["value"]) == (lr, decay)
    assert values["optimizer.lr"]["origin"] == ("task default" if lr < 1e-3 else "default")


def test_from_scratch_the_defaults_are_the_simplest_case(check: Check) -> None:
    values = check("pretrain", model={"family": "llama", "config": LLAMA})
    found = {key: values[key]["value"] for key in (*KEYS, "precision.dtype", "schedule.warmup_steps")}
    assert found == {
        **{"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1, "schedule.warmup_ratio": None, "schedule.name": "cosine"},
        **{"precision.dtype": "fp32", "schedule.warmup_steps": 0},
    }
    assert {values[key]["origin"] for key in found} == {"default"}


def test_both_formats_are_shown(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    shown = check("sft", "--world-size", "2", zero={"stage": 1})
    assert shown["deepspeed_config"]["bf16"]["enabled"]
    elsewhere = shown["deepspeed_config_elsewhere"]
    assert "bf16" not in elsewhere
    assert {key: value for key, value in shown["deepspeed_config"].items() if key != "bf16"} == elsewhere
    assert main(["check", "r.json", "--world-size", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"precision.dtype {BOTH} task default" in said
    assert f"DeepSpeed gets ({BOTH}; here with bf16):" in said
    assert "deepspeed_config_elsewhere" not in check("sft", "--world-size", "2", precision={"dtype": "bf16"})


def test_a_warm_up_is_a_share_or_steps(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check(train={"steps": 33})
    schedule = load("r.json").recipe.schedule
    rates = [lr_at(step, schedule=schedule, peak=1.0, total_steps=33) for step in range(33)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0], "a tenth of 33 steps, rounded up"
    assert rates[32] == 0.0
    settings = ["--set", "schedule.warmup_steps=2", "--set", "schedule.warmup_ratio=0.1"]
    assert main(["check", "r.json", *settings]) == 78
    assert "remove one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32"), ((7, 0), "fp32"), (None, "fp32")]
)
def test_the_device_decides_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu") if capability is None else torch.device("cuda", 0)
    assert compute_format.format_of_devices(device, Messages.alone()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_this_gpu_is_asked_as_torch_asks_it() -> None:
    device = torch.device("cuda", 0)
    assert compute_format.multiplies_in_bf16(device) == torch.cuda.is_bf16_supported(including_emulation=False)
