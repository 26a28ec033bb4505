"""The form of docstrings and comments, read from the sources.

Each rule is a function from one file's text to its violations; each is also fed a text that breaks it.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("parallel", "trainer", "tools")
LONGEST = 100  # characters of a line that holds prose; the formatter allows code a little more


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# First words that leave the reader to guess what the sentence is about.
FRAGMENTS = words("""
    about after all another any around as at because before beside between both by each either every everything for
    from given how if in into it its like more most neither no none nothing of on one only other our out over so some
    something such that their there these they this those though through to true two under until what whatever when
    where whether which while who whoever whose why with within without
""")
ARTICLES = words("a an the")

# The docstring of a function or method begins with one of these verbs, or with an article.
VERBS = words("""
    add append apply ask attach attend begin bind bring build call change check close compare complete configure
    connect continue convert copy count create cut damage declare describe disturb divide do draw drop edit end
    enter escape exclude export fill find forget free gather get give go hang have hide hold ignore join judge keep
    kill lay leave let list load lower make mark measure move open parse play poison postpone prepare print
    raise read rebuild record redirect refuse register release remove rename repeat replace replay report
    restore return run save say seek send set settle show start store submit switch take tell train translate
    turn use wait wrap write yield
""")


def docstrings(text: str) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield each node that has a docstring, the line of the docstring, and its text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found is not None:
                yield node, node.body[0].lineno, found


def first_words(text: str) -> list[str]:
    """A function's docstring begins with a verb or an article, a module's or a class's with what it is."""
    wrong = []
    for node, line, found in docstrings(text):
        first = found.split()[0] if found.strip() else ""
        word = first.strip(".,:;").lower()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if word not in VERBS | ARTICLES:
                wrong.append(f"line {line}: {first!r} is no verb (see VERBS) and no article")
        elif word in FRAGMENTS:
            wrong.append(f"line {line}: {first!r} begins a fragment: begin with an article or a noun")
    return wrong


def long_lines(text: str) -> list[str]:
    """Prose is wrapped: docstrings, but for tables and examples, and comments, but for marks of tools."""
    lines = text.splitlines()
    prose = {
        number
        for node, line, _ in docstrings(text)
        for number in range(line, (node.body[0].end_lineno or line) + 1)  # type: ignore[attr-defined]
        if not lines[number - 1].lstrip().startswith(("|", ">>>", "..."))
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:")):
            prose.add(token.start[0])
    return [
        f"line {number} has {len(lines[number - 1])} characters, at most {LONGEST} where prose stands"
        for number in sorted(prose)
        if len(lines[number - 1]) > LONGEST
    ]


Rule = Callable[[str], list[str]]


def sources() -> Iterator[tuple[str, str]]:
    """Yield the path, from the root, and the text of each file that the rules hold for."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            yield name, path.read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", [first_words, long_lines], ids=lambda rule: rule.__name__)
def test_the_sources_keep(rule: Rule) -> None:
    assert [f"{name}, {wrong}" for name, text in sources() for wrong in rule(text)] == []


def test_no_word_is_both_refused_and_allowed() -> None:
    assert not FRAGMENTS & (VERBS | ARTICLES)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (first_words, '"""What a layer is."""'),
        (first_words, 'class A:\n    """Of the weight."""'),
        (first_words, 'class A:\n    """Those that wait."""'),
        (first_words, 'def f():\n    """Whether it fits."""'),
        (first_words, 'def f():\n    """Number of rows."""'),
        (first_words, 'def f():\n    """[N, D] → [N]."""'),
        (first_words, 'def f():\n    """"""'),
        (first_words, 'class A:\n    @property\n    def b(self):\n        """In the order of the layers."""'),
        (first_words, 'def f():\n    def g():\n        """By name."""'),
        (long_lines, '"""The ' + "very " * 20 + 'long."""'),
        (long_lines, "x = 1  # " + "w" * 100),
        (long_lines, "# " + "w" * 100),
    ],
)
def test_bad(rule: Rule, text: str) -> None:
    assert len(rule(text)) == 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (first_words, '"""Linear layers with their output features divided."""'),
        (first_words, 'class A:\n    """A checkpoint on disk."""'),
        (first_words, 'def f():\n    """Return the rows [N, D]."""'),
        (first_words, 'def f():\n    """The rows [N, D]."""'),
        (first_words, "def f():\n    # What follows has no docstring.\n    return 1"),
        (long_lines, '"""Sizes:\n\n| ' + "w" * 100 + ' |\n"""'),
        (long_lines, "x = 1  # noqa: E741" + " " * 100),
        (long_lines, 'x = "' + "w" * 100 + '"'),
    ],
)
def test_good(rule: Rule, text: str) -> None:
    assert rule(text) == []
