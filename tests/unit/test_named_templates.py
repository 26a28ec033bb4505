"""Chat templates that a recipe names: written as published, with the tokens they need, and never taken in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.chat_templates.named import HERE, names, source_of, tokens_of
from trainer.cli import main
from trainer.data.chat_template import ChatTemplate, Request
from trainer.data.fault import Fault
from trainer.schema import Data

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def said(*turns: str) -> list[dict[str, Any]]:
    """Turns of user and assistant by turns; one that begins with "! " is the system's."""
    system = [{"role": "system", "content": turn[2:]} for turn in turns if turn.startswith("! ")]
    others = [turn for turn in turns if not turn.startswith("! ")]
    return [*system, *({"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(others))]


CASES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": said("why?", "because")},
    "several": {"messages": said("why?", " because ", "and\nthen?", "nothing")},
    "system": {"messages": said("! be brief", "why?", "because", "so?", "so")},
    "tools": {
        "messages": [
            *({"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}),
            *(
                {"role": "tool", "content": "sunny"},
                {"role": "tool", "content": "hot"},
                {"role": "assistant", "content": "Nice."},
            ),
        ],
        "tools": TOOLS,
    },
    "tools, system": {"messages": said("! be brief", "why?", "because"), "tools": TOOLS},
    "tools, with a content": {
        "messages": [*said("weather?"), {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}],
        "tools": TOOLS,
    },
}
PUBLISHED = {"llama3": "llama3", "qwen2.5": "qwen2_5", "gemma2": "gemma", "gemma3": "gemma3", "phi3": "phi3"}


def written(source: str, case: dict[str, Any], *, prompts: bool) -> str:
    """What a template writes, or that it refuses."""
    turns = case["messages"][:-1] if prompts else case["messages"]
    request = Request(turns, case.get("tools"))
    try:
        return ChatTemplate(source, TOKENS).render(request, add_generation_prompt=prompts)
    except Fault:
        return "refused"


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_writes_what_the_published_one_writes(name: str) -> None:
    trl = pytest.importorskip("trl", reason="trl carries published templates")
    published = (Path(trl.__file__).parent / "chat_templates" / f"{PUBLISHED[name]}.jinja").read_text(encoding="utf-8")
    for case, row in CASES.items():
        if "tools" in row and name != "qwen2.5":
            continue
        for prompts in (False, True):
            assert written(source_of(name), row, prompts=prompts) == written(published, row, prompts=prompts), case


@pytest.mark.parametrize("case", ["one turn", "several", "system"])
def test_mistral_writes_what_its_own_package_writes(case: str) -> None:
    common = pytest.importorskip("mistral_common.protocol.instruct.request", reason="mistral-common is Mistral's own")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    row = {"messages": [{**turn, "content": turn["content"].strip()} for turn in CASES[case]["messages"]][:-1]}
    tokenizer = MistralTokenizer.v3(is_tekken=True)  # whose texts have no space where a sentencepiece model puts one
    found = tokenizer.encode_chat_completion(common.ChatCompletionRequest(messages=row["messages"]))
    ours = ChatTemplate(source_of("mistral"), TOKENS).render(Request(row["messages"]), add_generation_prompt=True)
    assert ours.replace("INST] ", "INST]") == found.text


# As the pages say that their sources name.
EXPECTED = {
    "chatml": "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n",
    "zephyr": "<|user|>\nwhy?</s>\n<|assistant|>\nbecause</s>\n",
    "llama2": "<s>[INST] why? [/INST] because </s>",
    "vicuna": "USER: why? ASSISTANT: because</s>",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nwhy?\n\n### Response:\nbecause</s>",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_published_as_text(name: str) -> None:
    assert written(source_of(name), CASES["one turn"], prompts=False) == EXPECTED[name]


def test_every_template_has_a_file_that_names_its_source() -> None:
    assert sorted(names()) == sorted(path.stem for path in HERE.glob("*.jinja"))
    table = json.loads((HERE / "templates.json").read_text(encoding="utf-8"))
    for name in names():
        first = source_of(name).splitlines()[0]
        assert re.match(r"\{#- .*https://", first), name
        assert table[name]["source"].startswith("https://")
        text = written(source_of(name), CASES["one turn"], prompts=False)
        assert all(token in text or token == "<|system|>" for token in tokens_of(name))
    described = str(Data.model_fields["chat_template"].description)
    assert ", ".join(names()) in described


# ------------------------------------------------------------------------------------- through the commands


@pytest.fixture
def inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    rows = [{"prompt": f"q{n}?", "completion": f"a{n} <|im_end|>"} for n in range(6)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.json"

    def inspect(*words: str, command: tuple[str, ...] = ("data", "inspect"), **data: Any) -> tuple[int, str]:
        value = {
            "run": {"dir": str(tmp_path / "runs")},
            "model": {"family": "llama", "config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}},
            "data": {"task": "sft", "sources": [{"path": str(tmp_path / "chats.jsonl")}], "workers": 1, "seq_len": 256, **data},
        }
        recipe.write_text(json.dumps(value))
        code = main([*command, str(recipe), *words])
        found = capsys.readouterr()
        return code, found.out + found.err

    return inspect


@pytest.mark.parametrize("name", ["chatml", "llama3", "vicuna"])
def test_a_turn_ends_as_the_template_ends_it(name: str, inspected: Callable[..., tuple[int, str]]) -> None:
    code, out = inspected("--row", "1", chat_template=name, eval_fraction=0.0)
    assert code == 0
    assert f"data: chat template: {name} (data.chat_template)\n" in out
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "vicuna": "<|endoftext|>"}[name]
    space = " " if name == "vicuna" else ""
    assert f"⟦{space}a0 <|im_end|>{end}⟧" in out
    ids = re.findall(r"⟦([\d ]+)⟧", out)[0].split()
    spelt = [str(byte) for byte in f"{space}a0 <|im_end|>".encode()]
    assert ids[:-1] == spelt, "what a content spells is text"
    assert int(ids[-1]) >= 256
    for token in tokens_of(name):
        assert re.search(rf"{re.escape(token)} = \d+", out)


def test_the_line_of_the_start_and_of_check(inspected: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    plain = "data: chat template: the tokenizer has none: a plain one (role, newline, content, end of document); "
    assert plain in inspected()[1]
    assert plain in inspected(command=("check",))[1]
    assert "data: chat template: chatml (data.chat_template)" in inspected(command=("check",), chat_template="chatml")[1]
    own = tmp_path / "mine.jinja"
    own.write_text(
        "{% for m in messages %}{{ m.role + '> ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
    )
    code, out = inspected("--row", "1", chat_template=str(own), eval_fraction=0.0)
    assert code == 0
    assert "user> q0?<|endoftext|>assistant> ⟦a0 <|im_end|><|endoftext|>⟧" in out


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatm", 'data.chat_template = "chatm": did you mean "chatml"?'),
        ("nonsense", 'data.chat_template = "nonsense": legal: alpaca, chatml, '),
        ("gone.jinja", 'data.chat_template = "gone.jinja" does not exist'),
    ],
)
def test_a_wrong_name_is_one_line(template: str, message: str, inspected: Callable[..., tuple[int, str]]) -> None:
    code, out = inspected(chat_template=template)
    assert code == 78
    assert message in out


def test_a_broken_file_is_said_of_the_key(inspected: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}")
    code, out = inspected(chat_template=str(broken))
    assert code == 78
    assert f"data.chat_template: {broken} is not valid: line 1" in out


def test_tokens_that_a_folder_lacks_are_named(inspected: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    from trainer.data.tokenizer_loading import make_tokenizer

    make_tokenizer("bytes").save(tmp_path / "base")
    code, out = inspected(chat_template="chatml", tokenizer=str(tmp_path / "base"))
    assert code == 78
    advised = re.search(r'data\.tokenizer does not have: add to data: ("new_tokens": \[.*\])', out)
    assert advised is not None
    followed = json.loads("{" + advised[1] + "}")
    code, out = inspected(chat_template="chatml", tokenizer=str(tmp_path / "base"), **followed)
    assert code == 0
    assert "written by the chat template alone: <|im_start|> = 257, <|im_end|> = 258" in out
