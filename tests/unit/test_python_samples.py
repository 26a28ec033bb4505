"""A sample counts as Python where ast.parse reads its whole statements, and where nothing is cut that is wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import transformers

from tools.python_samples import is_python, main, whole_statements
from trainer.data.tokenizer_loading import make_tokenizer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # of '\\d'
@pytest.mark.parametrize(
    ("sample", "left"),
    [
        ("def f(x):\n    return 1\n    y = (3,\n", "def f(x):\n    return 1\n"),
        ("def f():\n    if a:\n        b\n    elif", "def f():\n    if a:\n        b\n"),
        ("def f():\n    x\n    '''a\n    b", "def f():\n    x\n"),
        ("def f():\n    x\n    @g\n    def h(self):\n", "def f():\n    x\n"),
        (
            "def f():\n    try:\n        a\n    b = 1\n    c",
            "def f():\n    try:\n        a\n    b = 1\n",
        ),  # no except: an error
        ("def f():\n    try:\n        a\n", ""),  # one may follow
        ("def f(x):\n    y = (3\n    import z\n", "def f(x):\n    y = (3\n    import z\n"),  # no bracket can close that
        ("def f(x):\n        y\n    z\n", "def f(x):\n        y\n    z\n"),
        ("def f(x)\n    y\n", "def f(x)\n    y\n"),
        ("def ", ""),
        ("def a\x00:\n    b\n", "def a\x00:\n    b\n"),
        ("def f():\n    '\\d'\n", "def f():\n    '\\d'\n"),
    ],
)
def test_a_sample_is_cut_at_its_last_whole_statement(sample: str, left: str) -> None:
    assert whole_statements(sample) == left
    try:
        accepted = bool(ast.parse(left).body)
    except (SyntaxError, ValueError):
        accepted = False
    assert is_python(left) is accepted


@pytest.mark.parametrize("path", ["trainer/loop.py", "trainer/run/session.py"])
def test_source_cut_anywhere_is_python(path: str) -> None:
    source = (Path(__file__).parents[2] / path).read_text()
    for end in range(400, len(source), 97):
        assert is_python(whole_statements(source[:end])), source[:end][-200:]


def test_the_share_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of bytes that draws at random writes no Python."""
    tokenizer = make_tokenizer("bytes")
    tokenizer.save(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(tmp_path)
    assert main([str(tmp_path), "--prompt", "def ", "--samples", "3", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("0 of 3 samples of 'def ' are Python (")
