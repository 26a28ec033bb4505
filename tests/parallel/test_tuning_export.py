"""Tuned runs are resumed to the bit, and what they leave is what peft and transformers load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from parallel.quantized import QuantizedWeight
from tests.parallel.tuning import LORA, with_bottlenecks
from tools.campaign import exactness, reshard
from tools.campaign.cases import WAYS, arguments, digests, numbers, write_recipe
from tools.campaign.ranks import run_ranks, train
from trainer.errors import DataError

# peft 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BY_NAME = {way.name: way for way in WAYS}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, dtype, marks=pytest.mark.grid) for name in BY_NAME for dtype in ("fp32", "bf16")],
)
def test_a_resumed_run_is_the_undisturbed_one(name: str, dtype: str, tmp_path: Path) -> None:
    exact, total = exactness.run(BY_NAME[name], dtype, 6, 3, tmp_path, tuning={**LORA, "dropout": 0.1})
    assert (exact, total) == (2, 2)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that goes on from a folder of transformers' own."""
    import transformers

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64},
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    path = write_recipe(folder, steps=4, every=4, keep=1, tuning=LORA)
    recipe = {**json.loads(path.read_text()), "model": {"from_pretrained": str(folder / "base")}}
    path.write_text(json.dumps(recipe))
    return path


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    tokens = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in {"dp2-zero3", "tp2xpp2"} else [pytest.mark.grid]) for n in BY_NAME]
)
def test_peft_and_transformers_load_every_layouts_export(name: str, pretrained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from trainer.checkpoint.export import compare_logits, export

    way, run, base = BY_NAME[name], tmp_path / "run", pretrained.parent / "base"
    ended = run_ranks(train, arguments(pretrained, run, way), world_size=way.processes, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    of_run = load_file(run / "export" / "adapter_model.safetensors")
    assert len(of_run) == 4 * 7 * 2
    assert all(tensor.numel() and tensor.any() for tensor in of_run.values())

    checkpoint = run / "checkpoints" / "step-00000004"
    export(checkpoint, tmp_path / "adapter")
    of_checkpoint = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert of_run.keys() == of_checkpoint.keys()
    assert all(torch.equal(of_run[key], of_checkpoint[key]) for key in of_run)

    export(checkpoint, tmp_path / "merged", whole=True)
    # The training network with the adapter beside its weights, against transformers with the merged ones: seen 3e-7.
    assert compare_logits(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    tuned = logits_of(base, run / "export")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), tuned, rtol=0, atol=1e-6)
    assert (tuned - logits_of(base)).abs().max() > 0.01, "the adapter changes nothing"


# peft 0.21 looks for modules of the names in its own AdaLoRA pattern, which are names of parameters.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("method", [pytest.param("dora", marks=pytest.mark.grid), "adalora", "ia3"])
def test_other_adapters_leave_too(method: str, pretrained: Path, tmp_path: Path) -> None:
    from trainer.checkpoint.export import compare_logits, export

    keys = json.loads(pretrained.read_text())
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**keys, "tuning": {"method": method}}))
    ended = run_ranks(train, arguments(recipe, tmp_path / "run", BY_NAME["tp2"]), world_size=2, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    export(checkpoint, tmp_path / "merged", whole=True)
    assert compare_logits(checkpoint, tmp_path / "merged", "fp32") < 1e-5
    tuned = logits_of(pretrained.parent / "base", tmp_path / "run" / "export")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), tuned, rtol=0, atol=1e-6)
    assert (tuned - logits_of(pretrained.parent / "base")).abs().max() > 1e-4, "the adapter changes nothing"
    export(checkpoint, tmp_path / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "run" / "export" / file).read_bytes()
    if method == "adalora":
        pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
        assert len(pattern) == 4 * 7
        assert sum(map(sum, pattern.values())) == 4 * 7 * 4  # target_rank of each


def test_bottleneck_adapters_leave_and_are_put_behind_a_model(pretrained: Path, tmp_path: Path) -> None:
    import transformers

    from trainer.checkpoint.export import compare_logits, export
    from trainer.cli import main
    from trainer.tuning.bottleneck_format import load_bottlenecks

    keys, base, run = json.loads(pretrained.read_text()), pretrained.parent / "base", tmp_path / "run"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**keys, "tuning": {"method": "adapter", "bottleneck": 6}}))
    ended = run_ranks(train, arguments(recipe, run, BY_NAME["tp2"]), world_size=2, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    assert {path.name for path in (run / "export").iterdir()} >= {"bottleneck_config.json", "bottleneck.safetensors"}
    assert not (run / "export" / "config.json").exists()

    def logits(model: nn.Module) -> torch.Tensor:
        tokens = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return model.eval()(tokens).logits

    model = transformers.AutoModelForCausalLM.from_pretrained
    tuned = logits(load_bottlenecks(model(base), run / "export"))
    torch.testing.assert_close(tuned, logits(with_bottlenecks(model(base), run / "export")), rtol=0, atol=1e-6)
    assert (tuned - logits_of(base)).abs().max() > 1e-3, "the adapters change nothing"
    with pytest.raises(DataError, match="its adapters are not for this model"):
        load_bottlenecks(nn.Module(), run / "export")

    checkpoint = run / "checkpoints" / "step-00000004"
    export(checkpoint, tmp_path / "whole", whole=True)
    # The training network against transformers' with the same adapters: seen 3e-7.
    assert compare_logits(checkpoint, tmp_path / "whole", "fp32") < 1e-5
    torch.testing.assert_close(
        logits(load_bottlenecks(model(tmp_path / "whole"), tmp_path / "whole")), tuned, rtol=0, atol=1e-6
    )
    for source in (checkpoint, run / "export"):
        assert main(["generate", str(source), "--prompt", "3 times ", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "merged"), "--merge"]) == 78


@pytest.mark.grid
def test_a_run_can_leave_a_merged_model(pretrained: Path, tmp_path: Path) -> None:
    way, keys = BY_NAME["tp2"], ("tuning.merge=true",)
    ended = run_ranks(train, arguments(pretrained, tmp_path / "run", way, *keys), world_size=2, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    ended = run_ranks(train, arguments(pretrained, tmp_path / "beside", way), world_size=2, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    assert numbers(tmp_path / "run") == numbers(tmp_path / "beside")
    expected = logits_of(pretrained.parent / "base", tmp_path / "beside" / "export")
    torch.testing.assert_close(logits_of(tmp_path / "run" / "export"), expected, rtol=0, atol=1e-6)


def test_a_tuned_checkpoint_and_its_adapter_write_the_same_text(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.cli import main

    way, run = BY_NAME["one"], tmp_path / "run"
    assert run_ranks(train, arguments(pretrained, run, way), world_size=1, log=tmp_path / "log").codes == (0,)
    options = ["--prompt", "3 times ", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["generate", str(run / "checkpoints" / "step-00000004"), *options]) == 0
    of_checkpoint = capsys.readouterr().out
    assert of_checkpoint.startswith("3 times ")
    assert main(["generate", str(run / "export"), *options]) == 0
    assert capsys.readouterr().out == of_checkpoint


def test_another_rank_is_refused_on_resuming(pretrained: Path, tmp_path: Path) -> None:
    way, run = BY_NAME["one"], tmp_path / "run"
    assert run_ranks(train, arguments(pretrained, run, way), world_size=1, log=tmp_path / "log").codes == (0,)
    ended = run_ranks(train, arguments(pretrained, run, way, "tuning.rank=8"), world_size=1, log=tmp_path / "log")
    assert ended.codes == (78,)
    assert "tuning.rank: " in ended.said
    assert "was saved with 4, this run has 8: it is another model" in ended.said


RESUMED = {"adalora": "tp2xpp2", "dora": "tp2xpp2", "ia3": "dp2-zero2", "adapter": "dp2-zero2", "bitfit": "dp2-zero2"}


@pytest.mark.parametrize(
    ("method", "layout"), [("adalora", "one"), *(pytest.param(*pair, marks=pytest.mark.grid) for pair in RESUMED.items())]
)
def test_other_methods_are_resumed(method: str, layout: str, tmp_path: Path) -> None:
    of_method = {
        "ia3": {"targets": ["attention", "down"]},
        "adalora": {"rank": 4, "budget": {"target_rank": 2, "warmup_steps": 1, "final_steps": 2}},
    }
    tuning = {"method": method, **of_method.get(method, {})}
    exact, total = exactness.run(BY_NAME[layout], "bf16", 6, 3, tmp_path, tuning=tuning)
    assert (exact, total) == (2, 2)


@pytest.mark.grid
def test_a_quantized_run_can_leave_a_merged_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from trainer.checkpoint.export import export

    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, steps=4, every=4, keep=1, hidden=128, tuning={**LORA, "quantize": "nf4"})
    ended = run_ranks(train, arguments(recipe, run, BY_NAME["tp2"]), world_size=2, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    export(run / "checkpoints" / "step-00000004", tmp_path / "merged", whole=True)
    of_run, of_checkpoint = (load_file(folder / "model.safetensors") for folder in (run / "export", tmp_path / "merged"))
    assert of_run.keys() == of_checkpoint.keys()
    assert all(torch.equal(of_run[name], of_checkpoint[name]) for name in of_run)


def on_another_base(body: Callable[..., int], *arguments: Any) -> int:
    """On ranks whose frozen weights are others until a checkpoint's have been restored."""
    quantize = QuantizedWeight.of
    QuantizedWeight.of = lambda weight, *more: quantize(weight.flip(0) * 2, *more)
    return body(*arguments)


QUANTIZED = {"hidden": 128, "tuning": {**LORA, "targets": ["attention", "mlp"]}}


@pytest.mark.parametrize(
    ("name", "dtype", "form"),
    [
        ("one", "bf16", "nf4"),
        pytest.param("dp2-zero3", "bf16", "int8", marks=pytest.mark.grid),
        pytest.param("tp2xpp2", "fp32", "nf4", marks=pytest.mark.grid),
    ],
)
def test_a_quantized_run_is_resumed_with_the_weights_that_were_saved(name: str, dtype: str, form: str, tmp_path: Path) -> None:
    keys = {**QUANTIZED, "tuning": {**QUANTIZED["tuning"], "quantize": form}}
    exact, total = exactness.run(BY_NAME[name], dtype, 4, 2, tmp_path, resumed=partial(on_another_base, train), **keys)
    assert (exact, total) == (2, 2)


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.grid)])
def test_a_quantized_checkpoint_is_read_in_other_layouts(form: str, tmp_path: Path) -> None:
    keys = {**QUANTIZED, "tuning": {**QUANTIZED["tuning"], "quantize": form}}
    recipe = write_recipe(tmp_path, steps=4, every=4, keep=9, **keys)
    ended = run_ranks(train, arguments(recipe, tmp_path / "run", BY_NAME["one"]), world_size=1, log=tmp_path / "log")
    assert ended.codes == (0,), ended.said
    checkpoint = start = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert sum(name.endswith(("codes codes", "magnitudes magnitudes")) for name in digests(start)) == 2 * 4 * 4
    for name in ("tp2", "dp2-zero3", "pp2", "one"):
        way, run = BY_NAME[name], tmp_path / name
        ended = run_ranks(
            on_another_base,
            *(reshard.save_again, str(recipe), str(run), way.keys, str(checkpoint)),
            world_size=way.processes,
            log=tmp_path / "log",
        )
        assert not any(ended.codes), ended.said
        checkpoint = run / "checkpoints" / checkpoint.name
        assert digests(checkpoint) == digests(start), name


@pytest.mark.parametrize(
    ("method", "form"),
    [("lora", "nf4"), pytest.param("dora", "int8", marks=pytest.mark.grid), pytest.param("ia3", "nf4", marks=pytest.mark.grid)],
)
def test_a_quantized_run_leaves_an_adapter_for_the_weights_that_it_saw(
    method: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The family has transposed weights. The base for peft is the checkpoint's own, made whole."""
    import transformers

    from trainer.checkpoint.export import Contents, Tuned, compare_logits, export
    from trainer.checkpoint.manifest import Manifest
    from trainer.cli import main

    run, out = tmp_path / "run", tmp_path / "merged"
    tuning = {"method": method, "targets": ["attention", "down"], "quantize": form}
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_embd=128, n_layer=4, n_head=4, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "from")
    recipe = write_recipe(tmp_path, steps=4, every=4, keep=1, tuning=tuning)
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "model": {"from_pretrained": str(tmp_path / "from")}}))
    ended = run_ranks(train, arguments(recipe, run, BY_NAME["tp2"]), world_size=2, log=tmp_path / "log")
    assert not any(ended.codes), ended.said
    assert main(["checkpoints", str(run), "--verify"]) == 0
    checkpoint = run / "checkpoints" / "step-00000004"
    assert main(["export", str(checkpoint), str(out), "--merge", "--verify"]) == 0
    # Two implementations of one network: seen 3e-7.
    assert compare_logits(checkpoint, out, "fp32") < 1e-5

    manifest = Manifest.read(checkpoint)
    contents = Contents(checkpoint, manifest, Tuned.of(checkpoint, manifest), adapter=False)
    shutil.copytree(out, tmp_path / "base")
    save_file(
        {name: contents.unmerged(name).contiguous() for name in contents.tensors}, tmp_path / "base" / "model.safetensors"
    )
    export(checkpoint, tmp_path / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (run / "export" / file).read_bytes()
    tuned = logits_of(tmp_path / "base", run / "export")
    torch.testing.assert_close(logits_of(out), tuned, rtol=0, atol=1e-5)
    assert (tuned - logits_of(tmp_path / "base")).abs().max() > 1e-4, "the adapter changes nothing"

    capsys.readouterr()
    assert main(["generate", str(checkpoint), "--prompt", "3 times ", "--max-new-tokens", "2", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("3 times ")
