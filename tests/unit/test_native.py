"""Whatever a tokenizer does to a text, it ends: in one line that names data.tokenizer, and leaves nothing to wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from trainer import schema
from trainer.data import native
from trainer.data.prepared import prepare
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import load_tokenizer
from trainer.errors import DataError, RecipeError

TEXT = "a" * 400
PANICS = r"(a+)+$"  # the library of regular expressions gives up, and Rust panics
DOUBLES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SLOW = r"a*a*a*(?<=c)"  # it looks at a text in as many ways as the cube of its length


def state(**changes: Any) -> dict[str, Any]:
    """A word-level tokenizer.json, with some of its parts changed."""
    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    found: dict[str, Any] = json.loads(backend.to_str())
    found["model"] |= changes.pop("model", {})
    return {**found, **changes}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replacing(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}


def put(folder: Path, tokenizer: Any, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    return str(folder)


FAILING = {
    "no unknown token": state(model={"unk_token": "[UNK]"}),
    "a panic where a text is split": state(pre_tokenizer=split(PANICS)),
    "a panic where a text is changed": state(normalizer=replacing(PANICS)),
    "a panic of a number": state(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "no unknown piece": state(model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["</s>", -2.0]]}),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_tokenizer_that_fails_on_a_text_is_the_recipes_fault(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(put(tmp_path / "it", FAILING[name]))
    for ask in (
        lambda: tokenizer.encode(TEXT + "!"),
        lambda: tokenizer.encode_with_offsets(TEXT + "!", special=True),
        lambda: tokenizer.encode_sequence(TEXT + "!", max_tokens=9),
    ):
        with pytest.raises(RecipeError, match=r"^data\.tokenizer: encoding 'aaa.* fails: .*; fix its tokenizer\.json, or give"):
            ask()


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer", "decoder"])
def test_a_regular_expression_that_explodes_is_left(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = split(SLOW) if place == "pre_tokenizer" else replacing(SLOW)
    long = "a" * 200  # 200⁴ / 24 steps, seconds, and nowhere so many that the library gives up
    model = {"vocab": {"<unk>": 0, "</s>": 1, "a": 2, long: 3}}
    tokenizer = load_tokenizer(put(tmp_path / "it", state(model=model, **{place: part})))
    monkeypatch.setattr(native, "PATIENCE_S", 0.3)
    with pytest.raises(RecipeError, match=r"takes longer than 0 s: look for a regular expression in its tokenizer\.json"):
        tokenizer.decode([3, 3]) if place == "decoder" else tokenizer.encode(f"{long} {long}")
    assert load_tokenizer(put(tmp_path / "good", state())).encode("a") == [2], "others are not waited for"


def test_a_text_that_doubles_is_left(tmp_path: Path) -> None:
    """In a process of its own, for what is left goes on: a core and, in minutes, all of the machine's memory."""
    folder = put(tmp_path / "it", state(normalizer={"type": "Sequence", "normalizers": [DOUBLES] * 40}))
    program = (
        "import sys; from trainer.data import native; from trainer.data.tokenizer_loading import load_tokenizer\n"
        "native.ROOM_BYTES = 1 << 26; load_tokenizer(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "takes more than 0.1 GiB of memory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab": {"<unk>": 0, "</s>": 1, "a": 2**31}}}, "'a' has the number 2147483648, and of 3 symbols none"),
        ({"model": {"vocab": {"<unk>": 0, "</s>": 1, "a": 2**32 - 1}}}, "'a' has the number 4294967295, and of 3"),
        ({"model": {"vocab": {"<unk>": 0, "</s>": 1, "a": 70_000}}}, "'a' has the number 70000, and of 3"),
        ({"model": {"vocab": {"<unk>": 0, "</s>": 1, "a": 2**60}}}, "damaged: invalid value"),
        ({"model": {"vocab": {"<unk>": 0, "</s>": 1, "a": -1}}}, "damaged: invalid value"),
        ({"model": {"type": "Magic"}}, "damaged: "),
        ({"pre_tokenizer": split("(")}, "damaged: Oniguruma error"),
    ],
)
def test_a_vocabulary_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, DataError), match=message):
        load_tokenizer(put(tmp_path / "it", state(**changes)))


def test_a_post_processor_that_writes_a_token_of_another() -> None:
    single = [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"</s>": {"id": "</s>", "ids": [4_000_000], "tokens": ["</s>"]}}
    post = {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}]}
    backend = Backend.from_str(json.dumps(state(post_processor={**post, "special_tokens": special})))
    with pytest.raises(
        RecipeError, match=r"data\.tokenizer: its post_processor writes the token 4000000, and its tokens are below"
    ):
        _ = Tokenizer(backend, end_of_document="</s>").opening


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"eos_token": {"content": ["</s>"]}}, "names no eos_token"),
        ({"eos_token": ["</s>"]}, "names no eos_token"),
        ({"eos_token": "\ud800"}, "tokenizer_config.json: not readable JSON"),
        ({"new_tokens": 5}, "new_tokens is a number, not a list of texts"),
        ({"new_tokens": [5]}, "new_tokens is a list, not a list of texts"),
        ({"chat_template": [{"name": ["x"], "template": "x"}]}, None),
        ({"added_tokens_decoder": [1], "extra_special_tokens": 5, "tokenizer_class": ["x"], "padding_side": 7}, None),
        ({"added_tokens_decoder": {str(2**60): {"content": "x", "special": True}}, "model_max_length": "x"}, None),
    ],
)
def test_a_config_of_other_types(config: dict[str, Any], error: str | None, tmp_path: Path) -> None:
    """What only transformers reads, and cannot, is said in a note."""
    folder = put(tmp_path / "it", state(), **config)
    if error is None:
        assert load_tokenizer(folder).encode("a") == [2]
        return
    with pytest.raises((RecipeError, DataError), match=error):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "chat_template.jinja"])
def test_a_pipe_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "it", state())
    (tmp_path / "it" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "it" / name)
    with pytest.raises(RecipeError, match=rf"data\.tokenizer: .*{name} is not a regular file"):
        load_tokenizer(folder)


def test_a_fault_of_ours_stays_one() -> None:
    def ours() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        native.bounded(ours, "doing something", size=0)


def test_a_forked_child_has_a_thread_of_its_own() -> None:
    program = (
        "import os; from trainer.data.tokenizer_loading import make_tokenizer, train_bpe; t = train_bpe(['a b'] * 9, 257)\n"
        "assert t.encode('a') == t.encode('a')\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if t.decode(t.encode('ab')) == 'ab' else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


def test_a_worker_names_the_tokenizer_and_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`triaxis data prepare` tokenizes in processes of their own, whose panics say nothing more."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a a a"}) + "\n" + json.dumps({"text": f"{TEXT}!"}) + "\n")
    tokenizer = put(tmp_path / "it", state(pre_tokenizer=split(PANICS)))
    data = schema.Data.model_validate(
        {"sources": [{"path": str(tmp_path / "texts.jsonl")}], "seq_len": 4, "workers": 1, "tokenizer": tokenizer}
    )
    with pytest.raises(RecipeError, match=r"data\.sources\[0\] \(texts\.jsonl\): data\.tokenizer: encoding a text fails: Onig"):
        prepare(data, seed=0, cache_dir=tmp_path / "cache", build=True, progress=lambda done, total, what: None)
    assert capfd.readouterr().err == ""
