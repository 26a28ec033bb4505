import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from parallel.documents import Documents
from parallel.params import initialise, owned_specs
from parallel.tensor import TensorParallel
from trainer.data.loader import MicroBatch
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import make_tokenizer, train_bpe
from trainer.errors import DataError, RecipeError, UserError
from trainer.inference.generate import sample, write_text
from trainer.inference.last_space import without_last_space
from trainer.inference.model_folder import opened
from trainer.inference.text_model import Writing
from trainer.model.blocks import blocks_of
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import write_folder
from trainer.model.transformer import Stage

V = 11


def next_logits(tokens: Sequence[int]) -> torch.Tensor:
    """Prefers the successor of the last token, by a margin that depends on the context's length."""
    logits = torch.zeros(V)
    logits[(tokens[-1] + 1) % V] = 1.0 + len(tokens) / 10
    return logits


def run(**changes: object) -> list[int]:
    options = {"new_tokens": 6, "context": 4, "end": 10, "temperature": 0.0, "top_k": V, "seed": 0} | changes
    return sample(next_logits, [1, 2], **options)


def test_temperature_zero_follows_the_likeliest_token() -> None:
    assert run() == [3, 4, 5, 6, 7, 8]


def test_it_stops_at_the_end_of_the_document_and_leaves_that_out() -> None:
    assert run(new_tokens=50) == [3, 4, 5, 6, 7, 8, 9]


def test_the_model_never_sees_more_than_its_context() -> None:
    seen = []

    def spy(tokens: Sequence[int]) -> torch.Tensor:
        seen.append(list(tokens))
        return next_logits(tokens)

    sample(spy, [1, 2], new_tokens=4, context=3, end=10, temperature=0.0, top_k=V, seed=0)
    assert seen == [[1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_sampling_depends_on_the_seed_and_nothing_else() -> None:
    first = run(temperature=1.0)
    torch.manual_seed(99)
    assert run(temperature=1.0) == first
    assert any(run(temperature=1.0, seed=seed) != first for seed in range(1, 6))


@pytest.mark.parametrize("seed", range(5))
def test_top_k_leaves_only_the_likeliest(seed: int) -> None:
    assert run(temperature=5.0, top_k=1, seed=seed) == run()


def test_the_first_token_can_be_chosen_among_some() -> None:
    assert run(first=[7, 9]) == [7, 8, 9], "the likeliest of both at temperature 0: they are equal, and end after 9"
    assert {run(first=[7, 9], temperature=5.0, new_tokens=1, seed=seed)[0] for seed in range(20)} == {7, 9}


def test_every_token_is_drawn_as_often_as_the_model_says() -> None:
    """Successor of 2 has logit 1.2, ten others 0; over 2000 seeds the share is within 4 standard deviations."""
    drawn = [run(temperature=1.0, new_tokens=1, end=V, seed=seed)[0] for seed in range(2000)]
    expected = next_logits([1, 2]).softmax(-1)
    share = torch.bincount(torch.tensor(drawn), minlength=V) / len(drawn)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / len(drawn)).sqrt()).all()


# ---------------------------------------------------------------------------------------- from an exported folder

POSITIONS = 24
Exports = dict[str, tuple[Path, Stage, Tokenizer]]
SHAPES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "initializer_range": 0.3},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    },
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """An untrained model of each family as a run leaves it, with the model itself."""
    made = {}
    for family, shape in SHAPES.items():
        tokenizer = make_tokenizer("bytes")
        config = from_hf(family, {**shape, "vocab_size": tokenizer.vocab_size})
        stage = Stage(
            config,
            blocks_of(config),
            dtype=torch.float32,
            recompute="none",
            tp=TensorParallel.alone(),
            device=torch.device("cpu"),
            fill=lambda block: initialise(block, seed=4),
        ).eval()
        folder = tmp_path_factory.mktemp("exports") / family
        write_folder(
            ((spec, parameter.detach()) for _, parameter, spec in owned_specs(stage)),
            folder,
            dtype=torch.float32,
            config=to_hf(config, dtype="float32", eos_token_id=tokenizer.end_of_document),
            save_beside=tokenizer.save,
        )
        made[family] = (folder, stage, tokenizer)
    return made


def continue_text(folder: Path, prompt: str = "ab c", **changes: object) -> str:
    options = {"new_tokens": 9, "temperature": 0.0, "top_k": 50, "seed": 0} | changes
    seed, pieces = options.pop("seed"), list[str]()
    with opened(str(folder)) as found:
        write_text(found, prompt, Writing(**options), seed=seed, show=pieces.append)
    return "".join(pieces)


@pytest.mark.parametrize("family", SHAPES)
def test_a_folder_continues_as_the_model_that_was_exported(family: str, exports: Exports) -> None:
    folder, stage, tokenizer = exports[family]

    @torch.no_grad()
    def logits(tokens: Sequence[int]) -> torch.Tensor:
        return stage(
            torch.tensor([list(tokens)]),
            batch=MicroBatch(torch.tensor([list(tokens)]), Documents.whole_rows(1, len(tokens))),
            output="logits",
        )[0, -1]

    prompt = tokenizer.encode("ab c")
    end = tokenizer.end_of_document
    tokens = sample(logits, prompt, new_tokens=9, context=POSITIONS, end=end, temperature=0.0, top_k=1, seed=0)
    assert len(tokens) > 3
    assert continue_text(folder) == tokenizer.decode([*prompt, *tokens])


CODE = ["def first(a):\n    return a\n", "def fold(function, values):\n    return values\n"]


def test_a_space_at_the_end_of_a_prompt_belongs_to_the_word_behind_it() -> None:
    tokenizer = train_bpe(iter(CODE), 270)
    given, first = without_last_space(tokenizer.encode("def "), tokenizer.spellings)
    assert given == tokenizer.encode("def")
    assert tokenizer.encode(" first")[0] in first
    assert all(tokenizer.decode([token]).startswith(" ") for token in first)
    for prompt in ("def", "def f", "def\n"):
        assert without_last_space(tokenizer.encode(prompt), tokenizer.spellings) == (tokenizer.encode(prompt), [])
    alone = make_tokenizer("bytes")  # in which no token has more than the space
    assert without_last_space(alone.encode("def "), alone.spellings) == (alone.encode("def "), [])


def test_a_folder_continues_a_space_with_words(tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(CODE), 270)
    tokenizer.save(tmp_path)
    config = transformers.LlamaConfig(vocab_size=270, **{**SHAPES["llama"], "initializer_range": 1.0})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    _, first = without_last_space(tokenizer.encode("def "), tokenizer.spellings)
    starts = {tokenizer.decode([token]) for token in first}
    found = {continue_text(tmp_path, "def ", new_tokens=1, temperature=1.0, seed=seed) for seed in range(8)}
    assert found <= {f"def{start}" for start in starts}
    assert len(found) > 1


def test_a_folder_s_continuation_depends_on_the_seed_only(exports: Exports) -> None:
    folder = exports["llama"][0]
    first = continue_text(folder, temperature=1.0)
    torch.manual_seed(99)
    assert continue_text(folder, temperature=1.0) == first
    assert any(continue_text(folder, temperature=1.0, seed=seed) != first for seed in (1, 2, 3))


@pytest.mark.parametrize("family", SHAPES)
def test_a_text_ends_at_the_model_s_last_position(family: str, exports: Exports) -> None:
    """gpt2 has no embedding beyond it, and would end in an IndexError."""
    folder, _, tokenizer = exports[family]
    text = continue_text(folder, "x" * (POSITIONS - 2), new_tokens=500, temperature=1.0)
    assert len(tokenizer.encode(text)) >= POSITIONS - 2
    assert_refused(
        folder, RecipeError, f"--prompt has {POSITIONS} tokens, but the model has {POSITIONS} positions", "x" * POSITIONS
    )


def assert_refused(folder: Path, kind: type[UserError], says: str, prompt: str = "a") -> None:
    with pytest.raises(kind) as caught:
        continue_text(folder, prompt)
    assert len(caught.value.lines) == 1
    assert says in caught.value.lines[0]


def test_a_prompt_without_a_character(exports: Exports) -> None:
    assert_refused(exports["llama"][0], RecipeError, "--prompt is empty", "")


def test_folders_that_do_not_load_whole(exports: Exports, tmp_path: Path) -> None:
    assert_refused(tmp_path, RecipeError, f"MODEL {tmp_path}: no checkpoint there; legal: a Hugging Face folder")
    folder = tmp_path / "copy"
    shutil.copytree(exports["llama"][0], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(folder, DataError, "tensor model.layers.1.mlp.up_proj.weight is missing")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert_refused(folder, DataError, f"{folder}: cannot be loaded")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, DataError, f"{folder}: cannot be loaded")


def test_code_in_a_folder_is_not_run(exports: Exports, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exports["llama"][0], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bomb", "auto_map": {"AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "bomb.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert_refused(folder, DataError, f"{folder}: cannot be loaded")
    assert not (tmp_path / "executed").exists()
