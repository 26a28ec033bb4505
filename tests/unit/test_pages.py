"""The README and the guides, held against the code: what they show works, what they name is there, what they quote is said.

Each rule is a function from a page to what is wrong with it, and is also fed a page that breaks it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pages import ROOT, Block, Page, pages, simple_commands, trainer_words
from tools.key_reference import PAGE, Reference, anchor, reference
from trainer import errors
from trainer.cli import main, parse
from trainer.cluster.submit import read_site
from trainer.commands import COMMANDS
from trainer.data.fault import Fault
from trainer.data.tasks import ROW_TASKS
from trainer.errors import RecipeError
from trainer.recipe import known_keys
from trainer.schema import Recipe, Source

Rule = Callable[[Page], list[str]]
PAGES = pages()
README = PAGES[0]
WIDEST = 128

# ------------------------------------------------------------------------------------------------------------ the rules

PROGRAMS = frozenset(
    {
        *("triaxis", "python", "bash", "deepspeed", "torchrun", "srun", "mpirun", "scontrol", "pip", "wandb", "docker"),
        *("echo", "head", "tail", "printf", "seq", "mkdir", "curl"),
    }
)


class Shown(NamedTuple):
    """A command that a page shows. `in_text`: in a span, which may name a command without all of its words."""

    line: int
    words: list[str]
    in_text: bool


def commands_of(page: Page) -> Iterator[Shown]:
    """Yield every command that a page shows, in a block or in a span."""
    for block in page.blocks:
        if block.language == "bash":
            for command in simple_commands(block.text):
                yield Shown(block.line, command, in_text=False)
    for line, span in page.spans:
        program, _, rest = span.partition(" ")
        if rest and program in ("triaxis", "bash", "python", "pip") and "…" not in span:
            for command in simple_commands(span):
                yield Shown(line, command, in_text=True)


def programs_are_known(page: Page) -> list[str]:
    """A misspelt `triaxis` is no command of another program."""
    return [
        f"{page.path}:{line}: {command[0]} is no program that a page may start"
        for line, command, _ in commands_of(page)
        if command[0].rpartition("/")[2] not in PROGRAMS
    ]


def triaxis_commands_parse(page: Page) -> list[str]:
    """Commands are read by the program's own parser, and what they set are keys."""
    wrong = []
    for line, command, in_text in commands_of(page):
        words = trainer_words(command)
        if words is None or (in_text and len(words) == 1 and words[0] in COMMANDS):
            continue
        try:
            arguments = _parsed(words) if in_text else parse(words)
        except RecipeError as error:
            wrong.append(f"{page.path}:{line}: {' '.join(command)}: {error}")
            continue
        except SystemExit:  # --help and --version show something, and end
            continue
        keys = [setting.partition("=")[0] for setting in getattr(arguments, "set", [])]
        wrong += [f"{page.path}:{line}: --set {key}: no such key" for key in keys if not is_key(key)]
    return wrong


def _parsed(words: list[str]) -> Any:
    """Parse words, of which a text may leave out what they are about, as in `triaxis export --merge`."""
    for more in range(3 if all(word.startswith("-") for word in words[1:]) else 0):
        try:
            return parse([*words, *["x"] * more])
        except RecipeError:
            continue
    return parse(words)


def is_key(name: str) -> bool:
    """Say whether a recipe has this key; items of lists are written [0], or [] where any is meant."""
    return re.sub(r"\[\d*\]", "[0]", name) in known_keys() or name.startswith("model.config.")


def scripts_and_modules_exist(page: Page) -> list[str]:
    """Scripts that are started by their path, and modules by their name, are there and have the flags that they are given."""
    wrong = []
    for line, command, _ in commands_of(page):
        file = _started_file(command)
        if file is None:
            continue
        if not (ROOT / file).is_file():
            wrong.append(f"{page.path}:{line}: {' '.join(command)}: there is no {file}")
            continue
        source = (ROOT / file).read_text(encoding="utf-8")
        flags = [word for word in command if word.startswith("--") and word != "--set"] if file.endswith(".py") else []
        wrong += [f"{page.path}:{line}: {file} has no {flag}" for flag in flags if f'"{flag}"' not in source]
    return wrong


def _started_file(command: list[str]) -> str | None:
    if command[0] in ("bash", "python") and len(command) > 1 and "/" in command[1]:
        return command[1]
    if command[0] == "python" and command[1:2] == ["-m"] and command[2].startswith(("tools.", "trainer.")):
        return f"{command[2].replace('.', '/')}.py"
    return None


def launchers_parse(page: Page) -> list[str]:
    """Words for torchrun and deepspeed are read by their own parsers."""
    wrong = []
    for line, command, _ in commands_of(page):
        if command[0] not in ("torchrun", "deepspeed") or any("$" in word for word in command):
            continue
        try:
            _launcher_parser(command[0])(command[1:])
        except SystemExit:
            wrong.append(f"{page.path}:{line}: {command[0]} does not take: {' '.join(command[1:])}")
    return wrong


def _launcher_parser(launcher: str) -> Callable[[list[str]], Any]:
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        return get_args_parser().parse_args
    from deepspeed.launcher.runner import parse_args

    return parse_args


def links_lead_somewhere(page: Page) -> list[str]:
    """Every link within the repository leads to a file or folder, and to a heading where it names one."""
    wrong = []
    for line, target in page.links:
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        to = page.folder / path if path else ROOT / page.path
        if not to.exists():
            wrong.append(f"{page.path}:{line}: {target} leads nowhere")
        elif heading:
            there = page if not path else Page(path, to.read_text(encoding="utf-8"))
            if heading not in map(anchor, there.headings):
                wrong.append(f"{page.path}:{line}: {target}: that page has no such heading")
    return wrong


FOLDERS = ("trainer", "parallel", "tools", "tests", "ds_configs", "slurm")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*|[\w-]+\.(?:py|sh)")


def paths_exist(page: Page) -> list[str]:
    """Every path in a span is there, from the root or beside the page."""
    return [
        f"{page.path}:{line}: {span} is not there"
        for line, span in page.spans
        if PATH.fullmatch(span) and not any((start / span).exists() for start in (ROOT, page.folder, ROOT / "trainer"))
    ]


KEY = re.compile(rf"(?:{'|'.join(Recipe.model_fields)})\.[a-z][\w.\[\]]*")
NO_KEYS = frozenset({"model.generate"})  # a method of transformers'
FILE_ENDINGS = (".gz", ".zst", ".jsonl", ".json", ".csv", ".tsv")


def keys_exist(page: Page) -> list[str]:
    """Every key of a recipe in a span is one, also where a span shows how it is written."""
    wrong = []
    for line, span in page.spans:
        if KEY.fullmatch(span) and span not in NO_KEYS and not span.endswith(FILE_ENDINGS) and not is_key(span):
            wrong.append(f"{page.path}:{line}: {span} is no key of a recipe")
        if re.match(r'"\w+": ', span):
            try:
                written = json.loads(f"{{{span}}}")
            except ValueError as error:
                wrong.append(f"{page.path}:{line}: {span} is not JSON: {error}")
                continue
            wrong += [f"{page.path}:{line}: {key} is no key of a recipe" for key in _written_keys(written) if not is_key(key)]
    return wrong


def _written_keys(value: Any, at: str = "") -> Iterator[str]:
    if isinstance(value, dict) and at != "model.config":
        for key, inner in value.items():
            yield from _written_keys(inner, f"{at}.{key}".removeprefix("."))
    elif at in ("extends", "runtime"):
        return
    else:
        yield at


def quoted_lines_are_said(page: Page) -> list[str]:
    """Every line in a table of what can go wrong is one that the program can say, example values aside."""
    wrong, in_table = [], False
    for line, cells in page.rows:
        if cells[0] == "line" and cells[1:] == ["remedy"]:
            in_table = True
        elif in_table and len(cells) == 2 and cells[0].startswith("`"):
            quoted = cells[0].strip("`")
            if said_of(quoted) < max(24, SAID_OF_A_LINE * len(quoted)):
                wrong.append(f"{page.path}:{line}: no part of the program says: {quoted}")
        else:
            in_table = False
    return wrong


SAID_OF_A_LINE = 0.25  # share of its characters that are the program's own words; the rest are example values


def said_of(line: str) -> int:
    """Return how many characters of a line stand in texts of the sources that match it, values aside."""
    covered: set[int] = set()
    for parts, pattern in templates():
        if all(part in line for part in parts) and (found := pattern.search(line)):
            at = found.start()
            for part in parts:
                at = line.index(part, at)
                covered |= {*range(at, at + len(part))}
    return len(covered)


@cache
def templates() -> list[tuple[list[str], re.Pattern[str]]]:
    """Return every text of the sources as the parts between its values, and a pattern for it with any values."""
    texts = {part for path in SPEAKING for part in _texts(ast.parse(path.read_text(encoding="utf-8")))}
    for path in (ROOT / "tools").glob("*.sh"):
        texts |= {re.sub(r"\$\w+", VALUE, text) for text in re.findall(r'"([^"\n]+)"', path.read_text(encoding="utf-8"))}
    all_parts = [[part for part in text.split(VALUE) if part] for text in texts]
    telling = [parts for parts in all_parts if sum(map(len, parts)) >= SHORTEST and any(" " in part for part in parts)]
    return [(parts, re.compile(".*".join(map(re.escape, parts)))) for parts in telling]


VALUE = "\0"  # in a text, in place of what it is filled with
SHORTEST = 10  # characters of a text that tells anything
SPEAKING = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "parallel").rglob("*.py"), ROOT / "tests" / "spawn.py"]


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values).strip()
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.strip()
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from _texts(child)


def lines_are_short(page: Page) -> list[str]:
    """No line is wider than an editor, but in tables, which cannot be broken."""
    return [
        f"{page.path}:{number}: {len(line)} characters"
        for number, line in enumerate(page.text.splitlines(), 1)
        if len(line) > WIDEST and not line.startswith("|") and page.path != PAGE.relative_to(ROOT).as_posix()
    ]


def programs_import_what_there_is(page: Page) -> list[str]:
    """What a ```python block takes from this repository is there."""
    wrong = []
    for block in page.blocks:
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("trainer", "parallel", "tests", "tools")):
                module = importlib.import_module(str(node.module))
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                wrong += [f"{page.path}:{block.line}: {node.module} has no {name}" for name in missing]
    return wrong


RULES: list[Rule] = [
    programs_are_known,
    triaxis_commands_parse,
    scripts_and_modules_exist,
    launchers_parse,
    links_lead_somewhere,
    paths_exist,
    keys_exist,
    quoted_lines_are_said,
    lines_are_short,
    programs_import_what_there_is,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_pages_keep_the_rule(rule: Rule) -> None:
    assert [wrong for page in PAGES for wrong in rule(page)] == []


BAD: list[tuple[Rule, str, str]] = [
    (programs_are_known, "```bash\ntriaxsi check recipe.json\n```", "triaxsi is no program"),
    (triaxis_commands_parse, "```bash\ntriaxis trian recipe.json\n```", "did you mean train?"),
    (triaxis_commands_parse, "```bash\nsrun bash -c 'torchrun -m trainer train'\n```", "required: RECIPE"),
    (
        triaxis_commands_parse,
        "```bash\npython -m trainer train r.json \\\n  --set train.step=1\n```",
        "train.step: no such key",
    ),
    (triaxis_commands_parse, "See `triaxis export --merged`.", "--merged"),
    (triaxis_commands_parse, "See `triaxis exprot`.", "did you mean export?"),
    (scripts_and_modules_exist, "```bash\nbash tools/tset.sh\n```", "there is no tools/tset.sh"),
    (scripts_and_modules_exist, "See `python -m tools.campaign.kill --cases 3`.", "there is no tools/campaign/kill.py"),
    (scripts_and_modules_exist, "```bash\npython tools/bench.py --quik\n```", "has no --quik"),
    (launchers_parse, "```bash\ntorchrun --nproc-per-nod=x --q -m trainer train r.json\n```", "torchrun does not take"),
    (launchers_parse, "```bash\ndeepspeed --num_gpsu 8 --module trainer train r.json\n```", "deepspeed does not take"),
    (links_lead_somewhere, "[a](trainer/nothing.md)", "trainer/nothing.md leads nowhere"),
    (links_lead_somewhere, "[a](README.md#no-such-place)", "no such heading"),
    (links_lead_somewhere, "# A\n[a](#b)", "no such heading"),
    (paths_exist, "in `trainer/nothing.py`", "trainer/nothing.py is not there"),
    (paths_exist, "in `nothing.py`", "nothing.py is not there"),
    (keys_exist, "the key `data.seq_length`", "data.seq_length is no key"),
    (keys_exist, 'as `"data": {"new_token": ["x"]}`', "data.new_token is no key"),
    (
        quoted_lines_are_said,
        "| line | remedy |\n|---|---|\n| `WEIGHTS runs/x: no checkpoint in that place; legal: a run's` | Correct it. |",
        "no part of the program says",
    ),
    (lines_are_short, "x" * (WIDEST + 1), f"{WIDEST + 1} characters"),
    (programs_import_what_there_is, "```python\nfrom trainer.schema import Recipes\n```", "has no Recipes"),
]


@pytest.mark.parametrize(("rule", "text", "said"), BAD)
def test_a_page_that_breaks_the_rule_is_found(rule: Rule, text: str, said: str) -> None:
    assert said in "\n".join(rule(Page("README.md", text)))


# ------------------------------------------------------------------------------------------------------- recipes and rows

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
# What recipes in the pages name: files of the user's, whose content `check` does not read, and Hugging Face folders.
FILES = (
    *("corpus.jsonl", "chats.jsonl", "maths.jsonl", "pairs.jsonl", "train.tsv"),
    *("train.en.gz", "train.de.gz", "test.en.gz", "test.de.gz"),
)
CONFIGS = {
    "path/to/folder": {"model_type": "llama", "max_position_embeddings": 4096, **SIZES},
    "path/to/pythia": {"model_type": "gpt_neox", "max_position_embeddings": 2048, **SIZES},
    "runs/answers/export": {"model_type": "llama", "max_position_embeddings": 64, **SIZES},
}


def supply(folder: Path) -> None:
    """Put into a folder what the pages' recipes name."""
    for file in FILES:
        (folder / file).touch()
    for name, config in CONFIGS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")


def is_recipe(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= {*Recipe.model_fields, "extends"}


def check_json(block: Block, folder: Path) -> str:
    """Return what is wrong with a ```json block: a recipe, a row of conversations or a site file; "" for nothing."""
    try:
        value = json.loads(block.text)
    except ValueError as error:
        return f"not JSON: {error}"
    file = folder / "shown.json"
    file.write_text(block.text)
    try:
        if is_recipe(value):
            parallel = value.get("parallel", {})
            ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
            return "" if main(["check", str(file), "--world-size", str(ranks)]) == 0 else "check refuses it"
        if "messages" in value:
            ROW_TASKS["sft"].format.of_source(Source(path="x")).example_of(value)
            return ""
        read_site(file)
    except (Fault, RecipeError) as error:
        return str(error)
    return ""


@pytest.fixture
def supplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    supply(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_and_row_of_the_pages_is_accepted(supplied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [(page, block) for page in PAGES for block in page.blocks if block.language == "json"]
    assert sum(is_recipe(json.loads(block.text)) for _, block in shown) > 10, "the recipes were not found"
    for page, block in shown:
        assert check_json(block, supplied) == "", f"{page.path}:{block.line}: {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train": {"steps": 1}', "not JSON"),
        ('{"train": {"stepz": 1}}', "check refuses it"),
        ('{"model": {"from_pretrained": "path/to/nothing/"}}', "check refuses it"),
        ('{"data": {"sources": [{"path": "nothing.jsonl"}]}, "model": {"family": "gpt2"}}', "check refuses it"),
        ('{"messages": [{"role": "nobody", "content": "a"}]}', "legal: "),
        ('{"particion": "gpu"}', "did you mean partition?"),
    ],
)
def test_json_that_would_fail_is_found(text: str, said: str, supplied: Path) -> None:
    assert said in check_json(Block("json", text, 1, ""), supplied)


# --------------------------------------------------------------------------------------------------------- the README


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= 200


def test_every_guide_has_its_parts_in_order() -> None:
    guides = [page for page in PAGES if page.path.endswith("/README.md")]
    assert len(guides) > 10, "the guides were not found"
    for page in guides:
        parts = [heading for heading in page.headings if heading in ("Smallest example", "What can go wrong", "How it works")]
        assert parts[:2] == ["Smallest example", "What can go wrong"], page.path


def test_the_readme_leads_to_every_guide() -> None:
    linked = {target.partition("#")[0] for _, target in README.links}
    assert {page.path for page in PAGES[1:]} - linked == set()


def test_the_readme_names_every_command() -> None:
    named = {words[0] for _, command, _ in commands_of(README) if (words := trainer_words(command))}
    assert set(COMMANDS) <= named


def folders_with_code() -> list[str]:
    """Return every folder that has Python files, and those of recipes and templates."""
    found = {path.parent.relative_to(ROOT).as_posix() for top in FOLDERS for path in (ROOT / top).rglob("*.py")}
    return sorted({*found, "ds_configs", "slurm"})


def test_the_map_names_every_folder() -> None:
    named = {span for _, span in README.section("How it is built").spans}
    assert [folder for folder in folders_with_code() if f"{folder}/" not in named] == []


def imports_that_rise(order: list[str]) -> list[str]:
    """Return the imports of `trainer` that lead from a folder to one that stands above it in a list."""
    rising = []
    for place, part in enumerate(order):
        for path in (ROOT / "trainer" / part).rglob("*.py"):
            found = set(re.findall(r"^\s*(?:from|import) trainer\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
            rising += [f"{path.relative_to(ROOT)} imports {above}" for above in order[:place] if above in found]
    return rising


def test_the_map_is_in_the_order_of_the_imports() -> None:
    named = [span.split("/")[1] for _, span in README.section("How it is built").spans if re.fullmatch(r"trainer/\w+/", span)]
    assert imports_that_rise(named) == []
    assert imports_that_rise(["data", "commands"]), "commands import data"


def test_the_readme_has_every_exit_code() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    shown = {int(cells[0]) for _, cells in README.section("Exit codes").rows if cells[0].isdigit()}
    assert shown == codes


def test_the_readme_gives_a_reason_for_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    listed = {name for _, cells in README.section("Packages").rows for name in re.findall(r"[\w-]+", cells[0])}
    assert {re.split(r"[<>=]", name)[0] for name in wanted} - listed == set()


def test_the_guides_are_not_shipped() -> None:
    """Without a MANIFEST.in setuptools packs what package-data lists."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert not (ROOT / "MANIFEST.in").exists()
    assert set(setuptools["package-data"]) == {"trainer"}
    assert {pattern.rpartition(".")[2] for pattern in setuptools["package-data"]["trainer"]} == {"j2", "jinja", "json"}


# ---------------------------------------------------------------------------------------------------- the key reference


def test_the_key_reference_is_what_the_schema_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "make it anew: python tools/key_reference.py"


def test_the_key_reference_has_every_key() -> None:
    shown = {re.sub(r"\[\]", "[0]", cells[0].strip("`")) for _, cells in Page.read(PAGE).rows}
    sections = set(Recipe.model_fields) - {"description"}
    assert {key for key in known_keys() if "eval_sources[0]" not in key} - sections <= shown


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ({"data.task": ["mlm"]}, "Only with `data.task` `mlm`."),
        ({"data.task": ["mlm", "sft", "translate"]}, "Only with `data.task` `mlm`, `sft` or `translate`."),
        ({"data.bos": [True]}, "Only with `data.bos` `true`."),
        ({"parallel.tensor": {"minimum": 2}}, "Only with `parallel.tensor` of 2 or more."),
        ({"tuning.method": []}, "Only with `tuning.method`."),
    ],
)
def test_a_key_that_is_used_only_with_another_says_so(only: dict[str, Any], said: str) -> None:
    key = {"type": "integer", "minimum": 1, "description": "How many [steps].", "only": only}
    schema = {
        "properties": {"part": {"$ref": "#/$defs/Part", "only": only}},
        "$defs": {"Part": {"description": "A part.", "properties": {"key": key}}},
    }
    page = Reference(schema, {"part": {"key": 3}}).page().splitlines()
    assert f"| `part.key` | whole number ≥ 1 [steps] | `3` | How many. {said} |" in page
    assert f"A part. {said}" in page


def test_the_schema_s_own_conditions_are_shown() -> None:
    page = Page.read(PAGE)
    meanings = {cells[0].strip("`"): cells[-1] for _, cells in page.rows}
    assert meanings["data.mask_fraction"].endswith("Only with `data.task` `mlm`.")


# -------------------------------------------------------------------------------------------------- figures in the pages


def test_the_timeline_shown_is_the_one_drawn(supplied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guide of layouts shows what its own commands print."""
    guide = next(page for page in PAGES if page.path == "parallel/README.md")
    example = guide.section("Smallest example")
    recipe = next(block for block in example.blocks if block.file == "layers.json")
    (supplied / "layers.json").write_text(recipe.text)
    (words,) = [words for _, command, _ in commands_of(example) if (words := trainer_words(command)) and words[0] == "schedule"]
    assert main(words) == 0
    drawn = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = next(block for block in guide.blocks if block.language == "text" and block.text.startswith("1f1b: "))
    assert shown.text.splitlines() == drawn
