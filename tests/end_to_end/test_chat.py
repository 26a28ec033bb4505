"""`triaxis chat` and `triaxis generate`, as a user starts them: from a folder, a run, a checkpoint and an adapter."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.end_to_end.chats import END, chat_model, tuned_run
from trainer.cli import main
from trainer.data.conversations import ChatRows

# peft 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUESTIONS = ("double 3", "and what of 4?", "why <|end|> é 🙂")
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [256, 257], "pad_token_id": 256}
WORDS = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_run(base, tmp_path_factory.mktemp("tuned") / "run")


class Stdin(io.TextIOWrapper):
    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Give the command these lines from a pipe, and return what came to stdout and stderr."""

    def said(model: Path, *lines: str, words: tuple[str, ...] = WORDS, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", Stdin("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(model), *words]) == code
        told = capsys.readouterr()
        return told.out, told.err

    return said


def answers_of(model: Any, folder: Path, questions: tuple[str, ...] = QUESTIONS, system: str | None = None) -> list[str]:
    """What transformers answers, turn after turn, from the whole conversation each time and without a cache."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if "<|" in question:  # we take a special token that a user spells as text; so transformers is given that text
            ids = as_text(tokenizer, messages)
        out = model.generate(
            **ids, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=[256, 257], pad_token_id=256
        )
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def as_text(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """The template written by hand, with the contents' special tokens as text."""
    ids: list[int] = []
    for message in messages:
        text = f"{message['role']}: {message['content']}"
        ids += [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], 257]
    ids += tokenizer("assistant: ", add_special_tokens=False)["input_ids"]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def loaded(folder: Path, adapter: Path | None = None) -> Any:
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def test_three_turns_are_those_of_transformers(base: Path, talk: Callable[..., tuple[str, str]]) -> None:
    expected = answers_of(loaded(base), base)
    assert len(set(expected)) == 3
    assert talk(base, *QUESTIONS)[0] == "".join(f"{answer}\n" for answer in expected)
    expected = answers_of(loaded(base), base, system="Be brief.")
    assert expected != answers_of(loaded(base), base)
    assert talk(base, *QUESTIONS, words=(*WORDS, "--system", "Be brief."))[0] == "".join(f"{answer}\n" for answer in expected)


def test_a_run_a_checkpoint_and_an_adapter_answer_as_pefts_model(
    base: Path, run: Path, talk: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter, checkpoint = run / "export", run / "checkpoints" / "step-00000002"
    assert (adapter / "adapter_config.json").is_file()
    expected = answers_of(loaded(base, adapter), adapter)
    assert expected != answers_of(loaded(base), base), "the adapter changes nothing"
    for model in (run, checkpoint, adapter):
        assert talk(model, *QUESTIONS)[0] == "".join(f"{answer}\n" for answer in expected), model
        assert main(["generate", str(model), "--prompt", QUESTIONS[0], *WORDS]) == 0
        told = capsys.readouterr()
        assert told.out == f"{expected[0]}\n"
        assert "the text is asked as a user's message: " in told.err

    config = json.loads((adapter / "adapter_config.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in adapter.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    for name, says in (
        ("gone/base", "no model at 'gone/base': give the adapter's model, --base FOLDER"),
        (None, "names no base_model_name_or_path: give the adapter's model, --base FOLDER"),
    ):
        said = "./gone/base" if name else None
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": said}))
        _, err = talk(moved, QUESTIONS[0], code=78)
        assert says.replace("'gone", "'./gone") in err
        assert len(err.splitlines()) == 1
    assert talk(moved, *QUESTIONS, words=(*WORDS, "--base", str(base)))[0].splitlines() == "\n".join(expected).splitlines()
    assert "is no adapter: leave it out" in talk(base, words=("--base", str(base)), code=78)[1]
    assert "--base: no model at" in talk(moved, words=("--base", str(tmp_path)), code=78)[1]
    (moved / "adapter_model.safetensors").rename(moved / "adapter_model.bin")
    assert "no adapter_model.safetensors there" in talk(moved, words=("--base", str(base)), code=65)[1]


def test_commands_in_a_conversation(base: Path, talk: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    first, second, _ = answers_of(loaded(base), base)
    again = answers_of(loaded(base), base, QUESTIONS[1:2])[0]
    out, err = talk(
        base, QUESTIONS[0], QUESTIONS[1], "/undo", QUESTIONS[1], f"/save {file}", "/reset", QUESTIONS[1], "/quit", "x"
    )
    assert out == "".join(f"{answer}\n" for answer in (first, second, second, again))
    assert "(taken back: and what of 4?)" in err
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    turns = ChatRows().example_of(row).turns
    assert [(turn.role, turn.content) for turn in turns] == [
        *(("user", QUESTIONS[0]), ("assistant", first), ("user", QUESTIONS[1]), ("assistant", second)),
    ]
    file.write_text(file.read_text().rstrip("\n"))
    talk(base, "/system Be brief.", QUESTIONS[0], f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == row
    assert [turn["role"] for turn in rows[1]["messages"]] == ["system", "user", "assistant"]
    assert rows[1]["messages"][2]["content"] == answers_of(loaded(base), base, QUESTIONS[:1], system="Be brief.")[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/undp", "/undp is no command; did you mean /undo?; /help lists them"),
        ("/save", "/save : give a name that ends in .jsonl, such as chats.jsonl"),
        ("/save a.txt", "/save a.txt: give a name that ends in .jsonl, such as chats.jsonl"),
        ("/save a.jsonl", "/save: there is no answer yet"),
        ('"""\nopen', 'stdin: a message begins with """ and has no end'),
        ("x" * 300, "the message takes 318 tokens with its template, and the model has 256 positions: shorten it"),
        ("\ufdd0", "holds U+FDD0, which Unicode keeps for programs' own marks; remove it"),
    ],
)
def test_a_mistake_in_a_pipe_is_one_line(line: str, says: str, base: Path, talk: Callable[..., tuple[str, str]]) -> None:
    out, err = talk(base, line, code=78)
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err


def test_several_lines_are_one_message(base: Path, talk: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    messages = ("two\nlines", "a\n\nb", "one line", "/reset is asked")
    talk(base, "two\\", "lines", '"""a', "", 'b"""', '"""one line"""', " /reset is asked", "", f"/save {tmp_path / 'a.jsonl'}")
    (row,) = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert tuple(turn["content"] for turn in row["messages"][::2]) == messages


def test_a_full_context_forgets_the_oldest_questions_and_says_so(
    base: Path, talk: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    """Each exchange takes about 70 of 256 tokens: the fourth has no room for the first."""
    questions = tuple(f"{number} {'what? ' * 5}" for number in range(5))
    out, err = talk(base, *questions, f"/save {tmp_path / 'a.jsonl'}", words=(*WORDS, "--system", "Be brief."))
    assert "(the context is full: the model no longer sees what came before question 2; /reset begins anew)" in err
    (row,) = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    assert out == "".join(f"{answer}\n" for answer in answers)
    model, tokenizer = loaded(base), transformers.AutoTokenizer.from_pretrained(base)
    for number in range(5):
        before = row["messages"][: 2 * number + 2]
        for dropped in range(number + 1):
            seen = [*before[:1], *before[1 + 2 * dropped :]]
            ids = tokenizer.apply_chat_template(seen, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            if ids["input_ids"].shape[1] + 12 <= 256:
                break
        out = model.generate(**ids, **GREEDY)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == answers[number]


def test_what_cannot_be_talked_with(base: Path, talk: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    assert "legal: a Hugging Face folder" in talk(tmp_path, code=78)[1]
    plain = chat_model(tmp_path / "plain", template="")
    _, err = talk(plain, "a", code=78)
    assert f"continue a text, triaxis generate {plain} --prompt TEXT" in err
    deaf = chat_model(tmp_path / "deaf", template="{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    assert "--system: the chat template leaves it out" in talk(deaf, "a", words=("--system", "Be brief."), code=78)[1]
    silent = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
    refusing = chat_model(tmp_path / "refusing", template=silent)
    assert "no system" in talk(refusing, "a", words=("--system", "Be brief."), code=78)[1]
    base_like = chat_model(tmp_path / "base_like", eos_token_id=256)
    assert "its generation does not end at the end of a turn: it has a chat template, and" in talk(base_like, "a")[1]


def test_prompts_from_a_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines\n\n")
    assert main(["generate", str(base), "--prompt-file", str(file), "--raw", *WORDS]) == 0
    from_file = capsys.readouterr().out
    assert main(["generate", str(base), "--prompt", "two\nlines\n", "--raw", *WORDS]) == 0
    assert capsys.readouterr().out == from_file
    for content, says in ((b"\xff", "not UTF-8"), (b"\n", "is empty"), (b"x" * 256, "has 256 tokens, but the model has 256")):
        file.write_bytes(content)
        assert main(["generate", str(base), "--prompt-file", str(file), "--raw"]) == 78
        assert f"--prompt-file {file}" in (err := capsys.readouterr().err)
        assert says in err
    assert main(["generate", str(base), "--prompt-file", str(tmp_path)]) == 78
    assert main(["generate", str(base)]) == 78


# ------------------------------------------------------------------------------------------------- at a terminal


class Screen:
    """A command at a pseudo-terminal, and what came to it."""

    def __init__(self, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "DS_ACCELERATOR": "cpu", "TERM": "dumb"}
        command = [sys.executable, "-m", "trainer", *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text: str) -> str:
        """Read until the text comes, and return what came since the last call."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
            except OSError:
                break
        found, _, self.seen = self.seen.partition(text)
        return found

    def settle(self) -> None:
        """Wait until the program waits: a signal between readline's prompt and its wait is heard with the next key."""
        asleep = 0
        while asleep < 20:
            time.sleep(0.01)
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self._ours)
        return code


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def start(*words: str) -> Screen:
        opened.append(Screen(*words))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_a_conversation_at_a_terminal(screen: Callable[..., Screen], tmp_path: Path) -> None:
    """Random weights write control characters, which must not come through; Ctrl-C stops an endless answer."""
    model = chat_model(tmp_path / "model", positions=100_000, eos_token_id=256)
    # Each of its tokens would end the answer with a chance of 2/258, which may be sooner than Ctrl-C comes.
    (model / "generation_config.json").write_text(json.dumps({"suppress_tokens": [256, 257]}))
    terminal = screen("chat", str(model), "--temperature", "3", "--max-new-tokens", "90000")
    assert "context 100,000 tokens" in terminal.until("Ctrl-D ends")
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello")
    answer = terminal.until("\\x")  # the first of them
    os.killpg(terminal.process.pid, signal.SIGINT)
    answer += terminal.until("(stopped: the answer is remembered as far as it came")
    controls = {letter for letter in answer if ord(letter) < 32} - {"\n", "\r", "\t"}
    assert controls == set()
    terminal.until("> ")
    terminal.settle()
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.until("(Ctrl-D or /quit ends)")
    terminal.type("/nothing\n")
    terminal.until("/nothing is no command")
    terminal.type(f"/save {tmp_path / 'a.jsonl'}\n")
    terminal.until("(written to")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    (row,) = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert row["messages"][0] == {"role": "user", "content": "hello"}
    assert any(ord(letter) < 32 for letter in row["messages"][1]["content"]), "what is saved is what was said"
    assert END not in row["messages"][1]["content"]
