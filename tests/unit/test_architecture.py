"""The borders of the tree, read from the sources: who imports whom, what nobody may call, what must stay small.

Each rule is a function from one file to its violations; each is also fed a file that breaks it.
"""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from trainer.tasks import TASKS
from trainer.tuning.methods import METHODS
from trainer.update_rules import RULES as UPDATE_RULES

ROOT = Path(__file__).parents[2]
OURS = ("parallel", "trainer", "tools", "tests")


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the root, with forward slashes."""

    path: str
    text: str

    @property
    def package(self) -> str:
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_start: bool  # executed when the importing module is imported

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


@cache
def imports(source: Source) -> list[Import]:
    """Everything that the file imports, wherever it stands in it; `from a import b` may import module a or a.b."""
    return list(_imports(source, source.tree, at_start=True))


def _imports(source: Source, node: ast.AST, *, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = at_start and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = False
        for name in _imported_names(source, child):
            yield Import(name, child.lineno, inside)
        yield from _imports(source, child, at_start=inside)


def _imported_names(source: Source, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = source.module.split(".")[: -node.level]
            base = ".".join([*parents, base] if base else parents)
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
        name = node.args[0] if node.args else None
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else ["(a computed name)"]
    return []


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(source: Source) -> Iterator[ast.Call]:
    return (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))


@cache
def sources() -> dict[str, Source]:
    """All our files, by module name."""
    paths = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
    found = [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    assert len(found) > 60, "the sources were not found"
    return {source.module: source for source in found}


# ------------------------------------------------------------------------------------------------------------ the rules

# Whom a package may import besides itself and, for `parallel`, the standard library and torch.
MAY_IMPORT = {"parallel": (), "trainer": ("parallel",), "tools": ("trainer", "parallel"), "tests": OURS}


def one_way(source: Source) -> list[str]:
    """tools → trainer → parallel → torch."""
    wrong = []
    for found in imports(source):
        if found.package in OURS and found.package not in (source.package, *MAY_IMPORT[source.package]):
            wrong.append(f"{source.path}:{found.line} imports {found.module}: imports go tools → trainer → parallel")
        elif source.package == "parallel" and found.package not in ("parallel", "torch", *sys.stdlib_module_names):
            wrong.append(f"{source.path}:{found.line} imports {found.module}: parallel needs nothing but torch")
    return wrong


def nobody_borrows_from_a_test(source: Source) -> list[str]:
    """No file borrows from a test: what two tests need is a library beside them, which says what it is for."""
    return [
        f"{source.path}:{found.line} imports {found.module}: move what it borrows to a module that is no test"
        for found in imports(source)
        if any(name.startswith("test_") for name in found.module.split("."))
    ]


# The parts of `trainer/`, a folder or a loose file each, from the ground up: a part may import those that stand before it.
LAYERS = (
    *("redaction", "errors", "spelling", "stopwatch", "versions", "outputs", "files", "exhausted", "tasks", "fine_tuning"),
    *("update_rules", "schema", "chat_templates", "learning_rate", "passes", "run_folder", "launch", "data", "model"),
    *("costs", "tuning", "convert", "recipe", "watchdog", "engine", "track", "checkpoint", "inference", "planner"),
    *("guard", "cluster", "doctor", "run", "inspection", "verify", "loop", "commands", "cli", "__main__", "requeue"),
)


def part(module: str) -> str:
    """The part of `trainer/` that a module is, or is in; "" of any other."""
    package, _, below = module.partition(".")
    return below.partition(".")[0] if package == "trainer" else ""


def arrows_fall(source: Source) -> list[str]:
    """No part imports one that stands above it, not even for its types: so no two import each other."""
    here = part(source.module)
    if not here:
        return []
    wrong = []
    for found in imports(source):
        there = part(found.module)
        if there in LAYERS and LAYERS.index(there) > LAYERS.index(here):
            wrong.append(f"{source.path}:{found.line} imports {found.module}: {there} stands above {here}")
    return wrong


def no_circle(source: Source) -> list[str]:
    """No chain of imports leads from a file back to it: read one of a circle and you have read none of it."""
    seen, routes = {source.module}, deque([[source]])
    while routes:
        route = routes.popleft()
        for found in {found.module for found in imports(route[-1])}:
            if route[-1].module.startswith(f"{found}."):  # its own package, of which it asks a neighbour
                continue
            if found == source.module and len(route) > 1:
                return [f"{source.path} imports itself: {' → '.join(one.module for one in route)} → {found}"]
            if found in sources() and found not in seen:
                seen.add(found)
                routes.append([*route, sources()[found]])
    return []


# The only files that may import a library, and whether they must wait until it is needed.
OWNERS: dict[str, tuple[bool, tuple[str, ...]]] = {
    # optimizers.py takes DeepSpeed's Lion through importlib; threaded_io.py replaces its async_io; master_weights.py sets its
    # master weights.
    "deepspeed": (
        False,
        (
            "trainer/engine/deepspeed_start.py",
            "trainer/doctor/deepspeed_ops.py",
            "trainer/engine/built_ops.py",
            "trainer/engine/threaded_io.py",
            "trainer/engine/optimizers.py",
            "trainer/engine/master_weights.py",
            "trainer/engine/zero_pipeline.py",
        ),
    ),
    "wandb": (True, ("trainer/track/wandb.py",)),
    "datasets": (True, ("trainer/data/readers.py",)),
    "tensorboard": (True, ("trainer/track/tensorboard.py",)),
    "matplotlib": (
        False,
        (
            "trainer/track/plots.py",
            "trainer/track/comparison_plots.py",
            "trainer/commands/timeline.py",
            "trainer/inference/translator.py",
        ),
    ),
    "sacrebleu": (True, ("trainer/inference/translator.py",)),
    "peft": (True, ("trainer/inference/model_folder.py",)),
    "transformers": (
        True,
        (
            "trainer/checkpoint/export.py",
            "trainer/data/auto_tokenizer.py",
            "trainer/inference/model_folder.py",
            "trainer/model/auto.py",
            "trainer/model/auto_stage.py",
        ),
    ),
    "huggingface_hub": (
        True,
        ("trainer/checkpoint/hub.py", "trainer/model/hugging_face.py", "trainer/checkpoint/model_card.py"),
    ),
    "zstandard": (True, ("trainer/data/files.py",)),
}


def owned_libraries(source: Source) -> list[str]:
    """A library has one place, so that its change of mind has one place."""
    wrong = []
    for found in imports(source):
        if found.package == "(a computed name)":
            wrong.append(f"{source.path}:{found.line} imports a computed name: nobody can see what it is")
        if found.package not in OWNERS:
            continue
        lazy, files = OWNERS[found.package]
        if source.path not in files:
            wrong.append(f"{source.path}:{found.line} imports {found.module}: only {', '.join(files)} may")
        elif lazy and found.at_start:
            wrong.append(f"{source.path}:{found.line} imports {found.module} at start: import it where it is used")
    return wrong


WITHOUT_TORCH = {
    "parallel.balance",
    "parallel.outputs",
    "parallel.pieces",
    "parallel.schedule_table",
    "parallel.schedules",
    "parallel.simulator",
    "parallel.topology",
    "trainer.recipe.batch_plan",
    "trainer.checkpoint.check",
    "trainer.checkpoint.resume_check",
    "trainer.checkpoint.facts",
    "trainer.checkpoint.folder",
    "trainer.checkpoint.geometry",
    "trainer.checkpoint.listing",
    "trainer.checkpoint.manifest",
    "trainer.checkpoint.disk_space",
    "trainer.cli",
    "trainer.commands",
    "trainer.convert",
    "trainer.doctor.build",
    "trainer.doctor.checks",
    "trainer.doctor.sheet",
    "trainer.engine.deepspeed_config",
    "trainer.engine.extension_folder",
    "trainer.engine.tiling",
    "trainer.files.durable",
    "trainer.fine_tuning",
    "trainer.errors",
    "trainer.costs.flops",
    "trainer.guard.spike_window",
    "trainer.inference.shown",
    "trainer.inference.terminal",
    "trainer.model.auto_network",
    "trainer.model.blocks",
    "trainer.costs.blocks",
    "trainer.model.config",
    "trainer.model.families",
    "trainer.model.names",
    "trainer.model.network",
    "trainer.model.hf_config",
    "trainer.cluster.preflight",
    "trainer.recipe",
    "trainer.launch.stop_request",
    "trainer.model.measures",
    "trainer.redaction",
    "trainer.cluster.requeue",
    "trainer.run_folder",
    "trainer.learning_rate",
    "trainer.passes",
    "trainer.planner",
    "trainer.schema",
    "trainer.launch.environment",
    "trainer.cluster.submit",
    "trainer.commands.timeline",
    "trainer.tasks",
    "trainer.tuning.methods",
    "trainer.tuning.sizes",
    "trainer.tuning.targets",
    "trainer.update_rules",
    "trainer.verify.compare",
    "trainer.verify.job",
    "trainer.verify.layouts",
    "trainer.verify.processes",
    "trainer.verify.table",
    "trainer.verify.twin",
}


def must_do_without_torch(source: Source) -> bool:
    in_data = source.path.startswith("trainer/data/") and source.path != "trainer/data/loader.py"
    return in_data or not WITHOUT_TORCH.isdisjoint(_with_parents(source.module))


def torch_at_start(source: Source) -> list[str]:
    """`check` answers in a fraction of a second, and tokenizing processes stay small: torch alone takes seconds."""
    if not must_do_without_torch(source):
        return []
    route = _route_to_torch(source)
    return [f"{source.path} imports torch at start: {' → '.join(route)}"] if route else []


def _route_to_torch(source: Source) -> list[str]:
    """The shortest chain of modules that are imported with this one and end in torch; [] when there is none."""
    seen, routes = {source.module}, deque([([source.module], source)])
    while routes:
        route, last = routes.popleft()
        for found in imports(last):
            if not found.at_start:
                continue
            if found.package in ("torch", "deepspeed"):
                return [*route, found.module]
            for module in _with_parents(found.module):
                if module in sources() and module not in seen:
                    seen.add(module)
                    routes.append(([*route, module], sources()[module]))
    return []


def _with_parents(module: str) -> list[str]:
    """Importing a.b.c runs a, a.b and a.b.c."""
    parts = module.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_NAMES = {"eval", "exec", "execfile"}
BANNED_CALLS = {
    *("torch.load", "torch.save", "np.load", "np.save", "numpy.load", "numpy.save"),  # pickle inside
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
BANNED_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}
# The only file that may run a folder's own code: with the recipe's explicit key, checked in `recipe/auto.py`.
MAY_TRUST = "trainer/model/auto.py"
# torch's collectives of Python objects pickle them.
BANNED_COLLECTIVES = {
    "broadcast_object_list",
    "gather_object",
    "all_gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def nothing_executes_data(source: Source) -> list[str]:
    """Data is JSON, safetensors or raw arrays: nothing that can run when it is read. Tests may build a bomb."""
    if source.package == "tests":
        return []
    wrong = [f"{source.path}:{i.line} imports {i.module}: no pickle" for i in imports(source) if i.package in PICKLERS]
    for call in calls(source):
        name = dotted(call.func)
        last = name.split(".")[-1]
        if name in BANNED_NAMES | BANNED_CALLS or last in BANNED_COLLECTIVES:
            wrong.append(f"{source.path}:{call.lineno} calls {name}")
        for keyword in call.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            may = keyword.arg == "trust_remote_code" and source.path == MAY_TRUST
            if keyword.arg in BANNED_KEYWORDS and not (is_false or may):
                wrong.append(f"{source.path}:{call.lineno} calls {name} with {keyword.arg}={ast.unparse(keyword.value)}")
    for found in imports(source):
        if found.module in BANNED_CALLS or found.module.split(".")[-1] in BANNED_COLLECTIVES:
            wrong.append(f"{source.path}:{found.line} imports {found.module}")
    return wrong


def no_print(source: Source) -> list[str]:
    """Ranks would write over each other's lines; what a user sees goes through the tracker or the command line."""
    if source.package not in ("trainer", "parallel"):
        return []
    return [f"{source.path}:{call.lineno} prints" for call in calls(source) if dotted(call.func) == "print"]


# A page or two each. When one is outgrown, extract a collaborator; do not raise the number in passing.
LINE_BUDGETS = {"parallel/topology.py": 120, "parallel/mesh.py": 110, "trainer/loop.py": 125, "trainer/engine/engine.py": 350}


def line_budget(source: Source) -> list[str]:
    lines, budget = source.text.count("\n"), LINE_BUDGETS.get(source.path, sys.maxsize)
    return [f"{source.path} has {lines} lines, its budget is {budget}: extract a collaborator"] if lines > budget else []


def no_module_level_groups(source: Source) -> list[str]:
    """Groups are arguments: no default group, no `global`."""
    if source.package not in ("trainer", "parallel"):
        return []
    return [f"{source.path}:{node.lineno} has global state" for node in ast.walk(source.tree) if isinstance(node, ast.Global)]


# Names that have a row in a table, by the file of the table.
TABLES = {
    "trainer/tasks.py": frozenset(TASKS),
    "trainer/update_rules.py": frozenset(UPDATE_RULES),
    "trainer/tuning/methods.py": frozenset(METHODS),
}


def tables_answer(source: Source) -> list[str]:
    """What depends on a name is a field of its row: a comparison elsewhere is a row spread out."""
    if source.package not in ("trainer", "parallel"):
        return []
    wrong = []
    for node in ast.walk(source.tree):
        asked = node.pattern if isinstance(node, ast.match_case) else node if isinstance(node, ast.Compare) else ast.Pass()
        for constant in (part for part in ast.walk(asked) if isinstance(part, ast.Constant)):
            for owner in (owner for owner, names in TABLES.items() if constant.value in names):
                wrong.append(f"{source.path}:{constant.lineno} asks for {constant.value!r}: give its row in {owner} a field")
    return wrong


Rule = Callable[[Source], list[str]]
RULES: tuple[Rule, ...] = (
    one_way,
    nobody_borrows_from_a_test,
    arrows_fall,
    no_circle,
    owned_libraries,
    torch_at_start,
    nothing_executes_data,
    no_print,
    line_budget,
    no_module_level_groups,
    tables_answer,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: Rule) -> None:
    for_tests_too = rule in (one_way, nobody_borrows_from_a_test)
    package_owned = [source for source in sources().values() if source.package != "tests" or for_tests_too]
    if rule is owned_libraries:  # benchmarks compare with other libraries' own loops
        package_owned = [source for source in package_owned if source.package != "tools"]
    assert [line for source in package_owned for line in rule(source)] == []


BAD: list[tuple[Rule, str, str]] = [
    (one_way, "parallel/mesh.py", "import trainer.errors"),
    (one_way, "parallel/mesh.py", "from trainer import errors"),
    (one_way, "parallel/mesh.py", "import numpy"),
    (one_way, "parallel/mesh.py", "def f():\n    import deepspeed"),
    (one_way, "parallel/mesh.py", "from ..trainer import loop"),
    (one_way, "trainer/loop.py", "from tests.spawn import spawn"),
    (one_way, "trainer/loop.py", "import tools.bench"),
    (one_way, "tools/bench.py", "import tests"),
    (nobody_borrows_from_a_test, "tests/unit/test_new.py", "from tests.unit.test_tuning import LLAMA"),
    (nobody_borrows_from_a_test, "tests/end_to_end/test_new.py", "def f():\n    from tests.end_to_end import test_train"),
    (nobody_borrows_from_a_test, "tests/parallel/training.py", "from .test_engine_parity import reference"),
    (nobody_borrows_from_a_test, "tools/bench.py", "import tests.parallel.test_guard"),
    (arrows_fall, "trainer/data/new.py", "from trainer.model.config import TransformerConfig"),
    (arrows_fall, "trainer/errors.py", "def f():\n    import trainer.schema"),
    (arrows_fall, "trainer/engine/new.py", "if TYPE_CHECKING:\n    from trainer.checkpoint.save import Saver"),
    (arrows_fall, "trainer/checkpoint/new.py", "from trainer import loop"),
    (no_circle, "trainer/data/digests.py", "from trainer.data import chat"),
    (owned_libraries, "trainer/loop.py", "import deepspeed"),
    (owned_libraries, "trainer/loop.py", "def f():\n    from deepspeed.ops import adam"),
    (owned_libraries, "trainer/loop.py", "import importlib\nimportlib.import_module('deepspeed.ops')"),
    (owned_libraries, "trainer/loop.py", "__import__('wandb')"),
    (owned_libraries, "trainer/loop.py", "import importlib\nimportlib.import_module('wan' + 'db')"),
    (owned_libraries, "trainer/track/jsonl.py", "import wandb"),
    (owned_libraries, "trainer/track/wandb.py", "import wandb"),
    (owned_libraries, "trainer/track/wandb.py", "class A:\n    import wandb"),
    (owned_libraries, "trainer/data/build.py", "def f():\n    import datasets"),
    (owned_libraries, "trainer/data/readers.py", "import datasets"),
    (owned_libraries, "trainer/track/report.py", "from matplotlib import pyplot"),
    (owned_libraries, "trainer/track/tracker.py", "def f():\n    import tensorboard"),
    (owned_libraries, "trainer/model/hugging_face.py", "def f():\n    import transformers"),
    (owned_libraries, "trainer/inference/model_folder.py", "try:\n    import transformers\nexcept ImportError:\n    pass"),
    (torch_at_start, "trainer/recipe/resolve.py", "import torch"),
    (torch_at_start, "trainer/cli.py", "from torch import nn"),
    (torch_at_start, "trainer/commands/check.py", "from trainer.engine.engine import Engine"),
    (torch_at_start, "trainer/schema.py", "from parallel import mesh"),
    (torch_at_start, "trainer/costs/flops.py", "from trainer.data.loader import MicroBatch"),
    (torch_at_start, "trainer/data/store.py", "import torch"),
    (torch_at_start, "trainer/data/new.py", "from trainer.inference.generate import sample"),
    (torch_at_start, "parallel/topology.py", "if True:\n    import torch.distributed"),
    (nothing_executes_data, "trainer/loop.py", "import pickle"),
    (nothing_executes_data, "trainer/loop.py", "def f():\n    from dill import loads"),
    (nothing_executes_data, "trainer/loop.py", "torch.load('x')"),
    (nothing_executes_data, "trainer/loop.py", "from torch import load"),
    (nothing_executes_data, "parallel/mesh.py", "eval('1')"),
    (nothing_executes_data, "parallel/mesh.py", "exec('1')"),
    (nothing_executes_data, "tools/bench.py", "os.system('ls')"),
    (nothing_executes_data, "tools/bench.py", "subprocess.run('ls', shell=True)"),
    (nothing_executes_data, "tools/bench.py", "subprocess.run('ls', shell=flag)"),
    (nothing_executes_data, "trainer/loop.py", "load(name, trust_remote_code=True)"),
    (nothing_executes_data, "trainer/model/auto.py", "subprocess.run('ls', shell=True)"),
    (nothing_executes_data, "trainer/loop.py", "yaml.load(text)"),
    (nothing_executes_data, "trainer/loop.py", "np.load(path)"),
    (nothing_executes_data, "trainer/loop.py", "dist.broadcast_object_list([1])"),
    (nothing_executes_data, "trainer/loop.py", "torch.distributed.gather_object(1)"),
    (nothing_executes_data, "trainer/loop.py", "from torch.distributed import all_gather_object"),
    (no_print, "trainer/loop.py", "def f():\n    print('x')"),
    (no_print, "parallel/mesh.py", "print('x')"),
    (line_budget, "parallel/mesh.py", "x = 1\n" * 111),
    (line_budget, "trainer/engine/engine.py", "x = 1\n" * 351),
    (tables_answer, "trainer/loop.py", "if recipe.data.task == 'sft':\n    pass"),
    (tables_answer, "trainer/loop.py", "x = task not in ('pretrain', 'mlm')"),
    (tables_answer, "trainer/loop.py", "match task:\n    case 'translate':\n        pass"),
    (no_module_level_groups, "parallel/mesh.py", "def f():\n    global GROUP\n    GROUP = 1"),
    (tables_answer, "trainer/recipe/zero.py", "stage = 0 if recipe.optimizer.name == 'adafactor' else 1"),
    (tables_answer, "trainer/recipe/zero.py", "stage = 0 if name in ('lion', 'sgd') else 1"),
    (tables_answer, "trainer/engine/new.py", "if recipe.tuning.method != 'adalora':\n    pass"),
    (tables_answer, "trainer/engine/new.py", "match name:\n    case 'adamw' | 'adam':\n        pass"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_a_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    violations = rule(Source(path, text))
    assert violations
    assert all(line.startswith(path) for line in violations)


GOOD: list[tuple[Rule, str, str]] = [
    (one_way, "parallel/mesh.py", "import torch\nfrom parallel.topology import Layout\nimport math"),
    (one_way, "trainer/loop.py", "from parallel.mesh import Mesh\nimport numpy"),
    (
        nobody_borrows_from_a_test,
        "tests/unit/test_new.py",
        "from tests.unit.shapes import LLAMA\nfrom tools.campaign import testing",
    ),
    (
        arrows_fall,
        "trainer/engine/new.py",
        "from trainer.engine import engine\nfrom trainer.model import config",
    ),
    (no_circle, "trainer/data/digests.py", "from trainer.data import fault"),
    (owned_libraries, "trainer/track/wandb.py", "def f():\n    import wandb"),
    (owned_libraries, "trainer/loop.py", "from trainer.track.wandb import WandbTracker\nimport trainer.data"),
    (torch_at_start, "trainer/cli.py", "def f():\n    import torch"),
    (torch_at_start, "trainer/cli.py", "if TYPE_CHECKING:\n    from trainer.engine.engine import Engine"),
    (nothing_executes_data, "trainer/loop.py", "model.eval()\nre.compile('x')\nload(name, trust_remote_code=False)"),
    (nothing_executes_data, "trainer/model/auto.py", "load(name, trust_remote_code=recipe.model.trust_remote_code)"),
    (nothing_executes_data, "trainer/loop.py", "subprocess.run(['ls'], shell=False)\njson.load(file)"),
    (tables_answer, "trainer/loop.py", "x = TASKS['sft'] if name in TASKS else kind == 'sft rows'"),
    (no_print, "trainer/loop.py", "console.print('x')"),
    (tables_answer, "trainer/engine/new.py", "MAKERS = {'adamw': None}\nmatch name:\n    case 'other':\n        x = 'sgd'"),
    (no_print, "tools/bench.py", "print('x')"),
]


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_a_rule_lets_pass_what_is_right(rule: Rule, path: str, text: str) -> None:
    assert rule(Source(path, text)) == []


def test_what_the_rules_name_exists() -> None:
    """A renamed file must not slip out of its rule."""
    named = {*LINE_BUDGETS, MAY_TRUST, *TABLES}
    named |= {path for _, files in OWNERS.values() for path in files}
    assert [path for path in named if not (ROOT / path).is_file()] == []
    assert [module for module in WITHOUT_TORCH if module not in sources()] == []
    for library, (_, files) in OWNERS.items():
        for path in files:
            module = path.removesuffix(".py").replace("/", ".")
            assert library in {found.package for found in imports(sources()[module])}, f"{path} no longer needs {library}"


def test_every_part_has_its_layer() -> None:
    assert {part(module) for module in sources()} - {""} == {*LAYERS}


def test_every_package_is_one() -> None:
    """Without __init__.py a folder is left out of the wheel."""
    folders = {path.parent for package in ("parallel", "trainer", "tests") for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
