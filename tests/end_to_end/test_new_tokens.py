"""A tokenizer larger than the model, as a user meets it: refused with advice, the advice followed, the adapter handed on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tools.campaign.cases import WAYS, Way, arguments
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.cli import main
from trainer.data.tokenizer_loading import load_tokenizer, make_tokenizer

# peft 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ONE = WAYS[0]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ADDED = ["<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"]


def base_folder(folder: Path, **config: Any) -> Path:
    """A model with a row for each byte and the end of document, and a tokenizer to which tokens were added since."""
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes, **config)).save_pretrained(folder)
    make_tokenizer("bytes").save(folder)
    backend = make_tokenizer("bytes")._backend
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    rows = [{"instruction": f"say {n} <|tool|>", "output": f"<|tool|>{n}"} for n in range(60)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"name": "chat", "dir": str(folder / "runs")},
        "model": {"from_pretrained": str(base)},
        "data": {
            **{"task": "sft", "tokenizer": str(base), "sources": [{"path": str(folder / "chats.jsonl")}]},
            **{"workers": 1, "seq_len": 32, **sections.pop("data", {})},
        },
        "batch": {"global_sequences": 4, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 3},
        **sections,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def run(recipe: Path, run_dir: Path, way: Way = ONE) -> Ended:
    return run_ranks(train, arguments(recipe, run_dir, way), world_size=way.processes, log=run_dir.parent / "log")


def test_the_advice_of_the_refusal_works_and_the_adapter_is_pefts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import peft
    import transformers

    base = base_folder(tmp_path / "base", tie_word_embeddings=False)
    tuning = {"method": "lora", "rank": 4}
    refused = run(write_recipe(tmp_path, base, tuning=tuning), tmp_path / "refused")
    assert refused.codes == (78,)
    advised = re.search(r"have no rows; name them, data.new_tokens (\[.*\]), and they get rows that learn", refused.said)
    assert advised is not None, refused.said
    assert json.loads(advised[1]) == ADDED

    recipe = write_recipe(tmp_path, base, tuning=tuning, data={"new_tokens": json.loads(advised[1])})
    ended = run(recipe, tmp_path / "run", WAYS[5])
    assert not any(ended.codes), ended.said
    assert "data.new_tokens: in the tokenizer already, and read wherever a text spells them: <|user|> = 257, " in ended.said
    adapter, checkpoint = tmp_path / "run" / "export", tmp_path / "run" / "checkpoints" / "step-00000003"
    assert main(["export", str(checkpoint), str(tmp_path / "whole"), "--merge", "--dtype", "fp32", "--verify"]) == 0

    ids = transformers.AutoTokenizer.from_pretrained(adapter)("<|user|>say 3 <|tool|><|end|>")["input_ids"]
    assert [token for token in ids if token > 256] == [257, 260, 259]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    expected = whole(torch.tensor([ids])).logits
    # It makes room in the base for what the adapter's tokenizer has.
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(tuned(torch.tensor([ids])).logits, expected, rtol=1e-4, atol=1e-5)  # fp32, other sums
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:257], before[name]), "frozen"
        moved = (after[name][257:] - before[name].mean(0)).abs().amax(-1)
        assert (moved > 1e-3).all(), f"{name}: a row did not learn"

    capsys.readouterr()
    assert main(["eval", str(checkpoint), str(tmp_path / "chats.jsonl")]) == 0
    assert main(["generate", str(checkpoint), "--prompt", "say 3 <|tool|>", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("family", [None, "auto"])
def test_a_whole_model_grows_and_keeps_its_own_rows(family: str | None, tmp_path: Path) -> None:
    """At a learning rate that changes nothing to see: what is exported is what was loaded, and the mean."""
    import transformers

    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    recipe = write_recipe(
        tmp_path,
        base,
        data={"new_tokens": ADDED},
        model={"from_pretrained": str(base), **({"family": family} if family else {})},
        optimizer={"lr": 1e-30},
        train={"steps": 1},
    )
    ended = run(recipe, tmp_path / "run")
    assert ended.codes == (0,), ended.said
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    after = model.get_output_embeddings().weight.detach()
    assert model.config.vocab_size == 261
    assert torch.equal(after[:257], before)
    torch.testing.assert_close(after[257:], before.mean(0).expand(4, -1), rtol=0, atol=1e-7)
    tokenizer = load_tokenizer(str(tmp_path / "run" / "export"))
    assert tokenizer.encode("a<|tool|>") == [97, 260]
