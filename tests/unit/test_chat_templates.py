"""The chat templates of forty published models: the tokens are those of transformers, the targets those of trl's training
variants of the same templates, which mark what the assistant says.

Each template is put beside a small byte-level BPE that has its special tokens. Where there is no variant, or it writes another
text, the answers are in chat_template_answers.json, read from the template by hand. Rows are refused only as REFUSED says.
"""

from __future__ import annotations

import datetime
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trainer.data.chat import Chat
from trainer.data.conversations import ChatRows
from trainer.data.fault import Fault
from trainer.data.template_sandbox import TODAY
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import train_bpe

trl = pytest.importorskip("trl", reason="trl carries the templates")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
ANSWERS: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("chat_template_answers.json").read_text("utf-8"))

EOS, BOS = "<|endoftext|>", "<s>"
TOKENS = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>]+｜>|<\|?[a-z_]+\|>|<\|[a-z_]+>|</?[a-z_]+>|\[/?[A-Z_]+\]|\[gMASK\]")
SPECIAL = re.compile(
    r".*[|｜].*|<s>|<(start|end)_of_(turn|utterance)>|<sop>|\[gMASK\]"
)  # the others are added, but not special
CORPUS = ["assistant user system what is the answer to a question with words yes no think reason tool call " * 3] * 20


def said(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def calling(content: str | None) -> dict[str, Any]:
    call = {"name": "get_weather", "arguments": {"city": "Rome"}}
    return said("assistant", content, tool_calls=[{"type": "function", "id": "call00001", "function": call}])


def thinking(word: str) -> str:
    return f"<think>\nreason {word}\n</think>\n\nIt is three."


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Weather of a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TOOL}]
SUNNY = said("tool", "sunny", name="get_weather", tool_call_id="call00001")
ASKED = said("user", "why?")
CASES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [ASKED, said("assistant", "because so")]},
    "several turns": {
        "messages": [ASKED, said("assistant", "because"), said("user", "and?"), said("assistant", "nothing  more")]
    },
    "system": {"messages": [said("system", "be brief"), ASKED, said("assistant", "because so")]},
    "one letter": {
        "messages": [
            *(said("user", "say s or a"), said("assistant", "s")),
            *(said("user", "assistant: a"), said("assistant", "a")),
        ]
    },
    "in the question": {
        "messages": [said("system", "Answer yes or no."), said("user", "yes or no: is 1 even?"), said("assistant", "no")]
    },
    "thought in the content": {
        "messages": [
            *(said("user", "six?"), said("assistant", thinking("six"))),
            *(said("user", "five?"), said("assistant", thinking("five"))),
        ]
    },
    "one thought": {"messages": [said("user", "six?"), said("assistant", thinking("six"))]},
    "thought apart": {"messages": [said("user", "six?"), said("assistant", "It is three.", reasoning_content="reason six")]},
    "tools": {"messages": [said("user", "weather?"), calling(""), SUNNY, said("assistant", "It is sunny.")], "tools": TOOLS},
    "tools, no content": {
        "messages": [said("user", "weather?"), calling(None), SUNNY, said("assistant", "It is sunny.")],
        "tools": TOOLS,
    },
    "a call at the end": {"messages": [said("user", "weather?"), calling(None)], "tools": TOOLS},
    "parts": {
        "messages": [
            said("user", [{"type": "text", "text": "why?"}]),
            said("assistant", [{"type": "text", "text": "because "}, {"type": "text", "text": "so"}]),
        ]
    },
}
CALLS = ("tools", "tools, no content", "a call at the end")
ALTERNATE = "its roles must alternate between user and assistant: transformers raises"
UNWRITTEN = "it does not write calls of tools, where transformers does not raise"
NEEDS_CONTENT = "it reads a content that is not there: transformers raises, and with an empty one it does not write the call"
REFUSED: dict[str, dict[str, str]] = {
    "cohere": dict.fromkeys(CALLS, ALTERNATE),
    "cohere2": {"tools": ALTERNATE, "tools, no content": ALTERNATE, "a call at the end": UNWRITTEN},
    "deepseek_r1_distill": {"tools": UNWRITTEN, "tools, no content": NEEDS_CONTENT, "a call at the end": NEEDS_CONTENT},
    "gemma": {
        "system": "it has no system role: transformers raises",
        "in the question": "it has no system role: transformers raises",
        **{"tools": ALTERNATE, "tools, no content": ALTERNATE, "a call at the end": UNWRITTEN},
    },
    "gemma3": {"tools": ALTERNATE, "tools, no content": ALTERNATE, "a call at the end": UNWRITTEN},
    "idefics3": dict.fromkeys(CALLS, UNWRITTEN),
    "lfm2": {"tools": UNWRITTEN, "tools, no content": NEEDS_CONTENT, "a call at the end": NEEDS_CONTENT},
    "llama3": dict.fromkeys(CALLS, UNWRITTEN),
    "llava_next": dict.fromkeys(CALLS, "it has no tools: transformers raises"),
    "phi3": {"tools": UNWRITTEN, "tools, no content": NEEDS_CONTENT, "a call at the end": NEEDS_CONTENT},
    "phi3_5": {"tools": UNWRITTEN, "tools, no content": NEEDS_CONTENT, "a call at the end": NEEDS_CONTENT},
    "qwen2_5_vl": dict.fromkeys(CALLS, UNWRITTEN),
    "smolvlm": dict.fromkeys(CALLS, UNWRITTEN),
}
# Templates that write a content only where it is given in parts, and those that write both; the others take one text.
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
TAKES_PARTS = re.compile(r"diffusion_gemma|gemma[34]|glm4moe|lfm2_2_5|muse_glimmer|qwen2_5_vl|qwen3_(5|6|8|vl)")
# What these variants mark, though the generation prompt has it already: generation does not write it.
MARKED_TOO = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "qwen2_5": "\n",
}
# transformers refuses what is trained here: arguments of a call as an object where the template wants text, no content.
ONLY_HERE = {"deepseekv3": CALLS}
OPENS_RESPONSE = ("diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5")  # behind a call, for the tool
WITHOUT_END = ("glm4moe",)  # writes nothing behind the last turn: there the end of document ends it


class Today(datetime.datetime):
    """The clock of templates here."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return TODAY


@cache
def bpe() -> Tokenizer:
    return train_bpe(CORPUS, 300)


@cache
def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def backend_with_tokens_of(name: str) -> Backend:
    backend = Backend.from_str(bpe()._backend.to_str())
    for token in sorted({*TOKENS.findall(source(name)), BOS}):
        added = AddedToken(token, special=SPECIAL.fullmatch(token) is not None, normalized=False)
        (backend.add_special_tokens if added.special else backend.add_tokens)([added])
    return backend


def answers_of(ids: list[int], is_target: list[Any]) -> list[list[int]]:
    """The runs of targets."""
    runs: list[list[int]] = []
    for at, token in enumerate(ids):
        if is_target[at]:
            if not (at and is_target[at - 1]):
                runs.append([])
            runs[-1].append(token)
    return runs


class Theirs:
    """transformers' tokens of a template, and the answers that its training variant marks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend_with_tokens_of(name), bos_token=BOS, eos_token=EOS)
        variant = TEMPLATES / f"{name}_training.jinja"
        self._variant = variant.read_text(encoding="utf-8") if variant.exists() else None

    def ids(self, row: dict[str, Any]) -> list[int]:
        found: list[int] = self.tokenizer.apply_chat_template(
            self._messages(row), chat_template=source(self.name), tools=row.get("tools"), return_dict=False
        )
        return found

    def answers(self, row: dict[str, Any], ids: list[int]) -> list[list[int]] | None:
        """None where the variant writes another text, or there is none."""
        if self._variant is None:
            return None
        found = self.tokenizer.apply_chat_template(
            self._messages(row),
            chat_template=self._variant,
            tools=row.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if found["input_ids"] != ids:
            return None
        return [self._own(run) for run in answers_of(ids, found["assistant_masks"])]

    def _own(self, run: list[int]) -> list[int]:
        """Less what the generation prompt has, and less white space behind the token that ends the turn."""
        marked_too = self.tokenizer.encode(MARKED_TOO.get(self.name, ""), add_special_tokens=False)
        assert run[: len(marked_too)] == marked_too
        run = run[len(marked_too) :]
        while not self.tokenizer.decode(run[-1:]).strip():
            run = run[:-1]
        return run

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**turn, "content": self._content(turn["content"])} for turn in row["messages"]]

    def _content(self, content: Any) -> Any:
        if isinstance(content, str) and self.name in PARTS_ONLY:
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and not (self.name in PARTS_ONLY or TAKES_PARTS.match(self.name)):
            return "".join(part["text"] for part in content)
        return content


@pytest.mark.parametrize("name", NAMES)
def test_every_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    config = {"bos_token": BOS, "chat_template": source(name)}
    chat = Chat(Tokenizer(backend_with_tokens_of(name), end_of_document=EOS, config=config), seq_len=4096, learned="answers")
    theirs = Theirs(name)
    for case, row in CASES.items():
        if case in REFUSED.get(name, {}):
            with pytest.raises(Fault):
                chat.render(ChatRows().example_of(row))
            continue
        encoded = chat.encode(chat.render(ChatRows().example_of(row)))
        assert encoded is not None
        found = answers_of(encoded.ids, encoded.is_target.tolist())
        expected = None
        if case not in ONLY_HERE.get(name, ()):
            ids = theirs.ids(row)
            ours = encoded.ids[:-1] if name in WITHOUT_END else encoded.ids
            assert ids[: len(ours)] == ours, case
            rest = theirs.tokenizer.decode(ids[len(ours) :]).strip()  # what teaches nothing is left out
            assert rest == ("<|tool_response>" if name in OPENS_RESPONSE and case == "a call at the end" else ""), case
            expected = theirs.answers(row, ids)
        if expected is None:
            assert [theirs.tokenizer.decode(run) for run in found] == ANSWERS[name][case], case
        else:
            assert found == expected, case


def test_what_variants_mark_too_is_in_the_generation_prompt() -> None:
    for name, text in MARKED_TOO.items():
        tokenizer = Theirs(name).tokenizer
        prompt = tokenizer.apply_chat_template([ASKED], chat_template=source(name), add_generation_prompt=True, tokenize=False)
        assert text in prompt[-len(text) - len("<think>\n") :]


def test_the_guide_says_which_templates_work() -> None:
    guide = (Path(__file__).parents[2] / "trainer" / "data" / "README.md").read_text(encoding="utf-8")
    listed = {name for row in re.findall(r"^\| (`\w.*?) \|", guide, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert {*NAMES} <= listed
