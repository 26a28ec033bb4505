"""`triaxis submit`: an sbatch script from a recipe and a template of slurm/, checked, quoted and
submitted. No torch.

A value reaches the script only through `plain` (it must match a pattern) or `quoted` (bash reads
back the same bytes), and none may hold a control character, "#SBATCH" or a secret. The job gets the
variables of an allow-list: their names are in the script, their values are not.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from trainer.errors import RecipeError
from trainer.files.durable import make_private, private_file
from trainer.files.reading import RECIPE_BYTES, read_text, told
from trainer.recipe.json_reader import JSONSyntaxError, Reader
from trainer.redaction import holds_secret
from trainer.schema import PositiveInt, Section
from trainer.spelling import nearest

# A link to slurm/ at the top of a checkout: a wheel has the templates under this name.
TEMPLATES = Path(__file__).parent / "templates"
ENDING = ".sbatch.j2"
SCRIPT = "job.sbatch"
OURS = "# Written by `triaxis submit` "  # in each template of slurm/
DEBUG_LIMIT_S = 30 * 60
SBATCH_ANSWERS_S = 60

# The variables of the submitting shell that a job needs, none of them secret. A site's `export`
# adds names.
EXPORTED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("CUDA_HOME", "HF_HOME", "HF_HUB_OFFLINE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "SLURM_CONF"),
)
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|^AWS_", re.IGNORECASE)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,+@:/-]*")
CONSTRAINT = re.compile(r"[A-Za-z0-9\[(][A-Za-z0-9._,&|*()\[\]:-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DURATION = re.compile(r"(?:(\d{1,3})-)?(\d{1,3}):([0-5]\d):([0-5]\d)", re.ASCII)
MEMORY = re.compile(r"\d{1,9}[KMGT]?", re.ASCII)


class Container(Section):
    """An image that the ranks run in."""

    runtime: Literal["apptainer", "pyxis"] = Field("apptainer", description="What opens it: apptainer, or srun's plugin pyxis.")
    image: str = Field(
        min_length=1, description="The image, in which triaxis is installed: a file, or for pyxis also USER@REGISTRY#IMAGE:TAG."
    )
    bind: list[str] = Field(default_factory=list, description='Folders to show inside, as "/data:/data".')
    nv: bool = Field(True, description="For apptainer: its --nv, which shows NVIDIA GPUs inside.")


class Site(Section):
    """The settings of a cluster, the same for every recipe."""

    partition: str | None = Field(None, description="#SBATCH --partition")
    account: str | None = Field(None, description="#SBATCH --account")
    qos: str | None = Field(None, description="#SBATCH --qos")
    reservation: str | None = Field(None, description="#SBATCH --reservation")
    constraint: str | None = Field(None, description="#SBATCH --constraint")
    memory: str | None = Field(None, description="#SBATCH --mem, as 64G")
    gpus_per_node: PositiveInt | None = Field(None, description="#SBATCH --gpus-per-node")
    device: str | None = Field(None, description="The kind of the GPUs, such as h100-80g, for plan, check and submit.")
    cpus_per_rank: PositiveInt | None = Field(None, description="#SBATCH --cpus-per-task, times the ranks that a task starts")
    exclusive: bool = Field(False, description="#SBATCH --exclusive")
    modules: list[str] = Field(default_factory=list, description="Environment modules to load.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables to set, written into the script.")
    export: list[str] = Field(default_factory=list, description="Variables of the submitting shell to pass on, by name.")
    container: Container | None = Field(None, description="For the template container.")


@dataclass(frozen=True)
class Order:
    """The request of a command line. `sweep`: the settings of each task of an array; () for a job
    without one. `plan_check`: the run does not start where its plan does not fit."""

    recipe: Path
    run_dir: Path
    name: str
    nodes: int
    ranks_per_node: int
    template: str
    time: str
    grace_s: int
    settings: tuple[str, ...] = ()
    sweep: tuple[tuple[str, ...], ...] = ()
    plan_check: bool = True


def template_names() -> list[str]:
    return sorted(path.name.removesuffix(ENDING) for path in TEMPLATES.glob(f"*{ENDING}") if not path.name.startswith("base"))


def read_site(path: Path | None) -> Site:
    """Return the settings of a site. RecipeError with a line for each thing that is wrong."""
    if path is None:
        return Site()
    try:
        return Site.model_validate(Reader(read_text(path, RECIPE_BYTES)).document())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--site {path}: {told(error)}") from error
    except JSONSyntaxError as error:
        raise RecipeError(f"--site {path}: not JSON: {error}") from None
    except ValidationError as error:
        raise RecipeError([_explain(path, dict(detail)) for detail in error.errors(include_url=False)]) from None


def _explain(path: Path, detail: Mapping[str, Any]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] != "extra_forbidden":
        return f"--site {path}: {key}: {detail['msg']}"
    meant = nearest(key, Site.model_fields)
    return f"--site {path}: {key} is not a key of a site" + (f"; did you mean {meant}?" if meant else "")


def read_sweep(path: Path) -> tuple[tuple[str, ...], ...]:
    """Return the settings of each task: every line is a JSON list of values for --set, such as
    ["optimizer.lr=0.001", "run.seed=1"]."""
    try:
        lines = [line for line in read_text(path, RECIPE_BYTES).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--sweep {path}: {told(error)}") from error
    if not 1 <= len(lines) <= 1000:
        raise RecipeError(f"--sweep {path}: {len(lines)} tasks: legal are 1 to 1,000, one a line")
    return tuple(_sweep_line(path, number, line) for number, line in enumerate(lines, 1))


def _sweep_line(path: Path, number: int, line: str) -> tuple[str, ...]:
    try:
        settings = json.loads(line)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, list) or not all(isinstance(item, str) for item in settings):
        raise RecipeError(f'--sweep {path}:{number}: must be a JSON list of strings, as ["optimizer.lr=0.001"]')
    return tuple(settings)


def task_folder(order: Order, task: int) -> Path:
    """Return the run folder of one task of a sweep."""
    return order.run_dir / f"task-{task}"


def render(order: Order, site: Site) -> str:
    """Return the script. RecipeError if a value must not be in one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    file = f"{order.template}{ENDING}"
    if order.template not in template_names():
        meant = nearest(order.template, template_names())
        hint = f"; did you mean {meant}?" if meant else ""
        raise RecipeError(f"--template {order.template}: not in {TEMPLATES}{hint}; legal: {', '.join(template_names())}")
    _check_times(order)
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return templates.get_template(file).render(_values(order, site))


def _values(order: Order, site: Site) -> dict[str, Any]:
    per_node = order.template == "torchrun"
    _check_shape(order, site)
    log = "slurm-%A_%a.out" if order.template == "array" else "slurm-%j.out"
    return {
        "template": f"slurm/{order.template}{ENDING}",
        "shell": "/bin/bash -l" if site.modules else "/bin/bash",  # a login shell knows `module`
        "job_name": plain("run.name", order.name, NAME),
        "nodes": order.nodes,
        "ranks_per_node": order.ranks_per_node,
        "tasks_per_node": 1 if per_node else order.ranks_per_node,
        "time": order.time,
        "grace_s": order.grace_s,
        "directives": list(_directives(site, order.ranks_per_node if per_node else 1)),
        "export": ",".join([*EXPORTED, *(plain("export", name, VARIABLE) for name in site.export)]),
        "output": quoted("the run folder", _nameable(order.run_dir / log, log)),
        "folder": quoted("the current folder", Path.cwd()),
        "modules": [plain("modules", name, NAME) for name in site.modules],
        "environment": [_variable(name, value) for name, value in site.environment.items()],
        "run_dir": quoted("the run folder", order.run_dir),
        "recipe": quoted("RECIPE", order.recipe),
        "python": quoted("Python's path", sys.executable),
        "settings": _settings(order.settings),
        "unchecked": "" if order.plan_check else "--no-plan-check ",
        "sweep": [
            {
                "run_dir": quoted("the run folder", task_folder(order, task)),
                "settings": _settings((*order.settings, *settings)),
            }
            for task, settings in enumerate(order.sweep)
        ],
        "container": _container(site.container, order),
    }


def _directives(site: Site, ranks_per_task: int) -> list[str]:
    named = {
        "partition": (site.partition, NAME),
        "account": (site.account, NAME),
        "qos": (site.qos, NAME),
        "reservation": (site.reservation, NAME),
        "constraint": (site.constraint, CONSTRAINT),
        "mem": (site.memory, MEMORY),
    }
    counts = {
        "gpus-per-node": site.gpus_per_node,
        "cpus-per-task": site.cpus_per_rank and site.cpus_per_rank * ranks_per_task,
    }
    lines = [
        f"--{key}={shlex.quote(plain(key, value, pattern))}" for key, (value, pattern) in named.items() if value is not None
    ]
    lines += [f"--{key}={value}" for key, value in counts.items() if value is not None]
    return [*lines, *(["--exclusive"] if site.exclusive else [])]


def _check_shape(order: Order, site: Site) -> None:
    if (order.template == "array") != bool(order.sweep):
        raise RecipeError("--sweep FILE and --template array go together: a line of the file for each task of the array")
    if (order.template == "container") != (site.container is not None):
        raise RecipeError('--template container needs "container" in the --site file, and no other template takes it')
    if order.template == "single-node" and order.nodes > 1:
        raise RecipeError(f"--nodes {order.nodes} with --template single-node: legal is 1; use multi-node")
    if site.gpus_per_node is not None and order.ranks_per_node > site.gpus_per_node:
        raise RecipeError(
            f"--ranks-per-node {order.ranks_per_node}, but the site's gpus_per_node is {site.gpus_per_node}: one rank to a GPU"
        )


def _check_times(order: Order) -> None:
    limit = seconds(order.time)
    if order.template == "debug" and limit > DEBUG_LIMIT_S:
        raise RecipeError(f"--time {order.time} with --template debug: legal is up to 00:30:00")
    if not order.grace_s < limit:
        raise RecipeError(f"--grace {order.grace_s} seconds must be less than --time {order.time}")


def seconds(time: str) -> int:
    match = DURATION.fullmatch(time)
    if not match or not any(int(part or 0) for part in match.groups()):
        raise RecipeError(f"--time {time!r} is not a duration: legal are HH:MM:SS and D-HH:MM:SS, more than 0")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _settings(settings: Sequence[str]) -> str:
    return " ".join(f"--set {_setting(setting)}" for setting in settings)


def _setting(setting: str) -> str:
    key, _, value = setting.partition("=")
    if holds_secret(value, key):
        raise _secret(f"--set {key}")
    return quoted("--set", setting)


def _variable(name: str, value: str) -> tuple[str, str]:
    plain("environment", name, VARIABLE)
    if SECRET.search(name):
        raise RecipeError(
            f"environment.{name} would be written into the script: give the name in `export`, and set it in the shell that "
            "submits"
        )
    return name, quoted(f"environment.{name}", value)


def _container(container: Container | None, order: Order) -> str:
    """Return what stands between srun's own options and the command of a rank."""
    if container is None:
        return ""
    if container.image.startswith("-"):
        raise RecipeError(f"container.image {container.image!r} starts with '-': give the path of a file")
    if container.runtime == "pyxis":
        words = _pyxis(container, order)
    else:
        binds = [word for bind in container.bind for word in ("--bind", bind)]
        words = ["apptainer", "exec", *(["--nv"] if container.nv else []), *binds, container.image]
    return " ".join(quoted("container", word) for word in words)


def _pyxis(container: Container, order: Order) -> list[str]:
    """Return the options of srun for pyxis. Folders that are not mounted may be invisible
    inside."""
    folders = dict.fromkeys((Path.cwd(), order.run_dir, order.recipe.parent))
    mounts = [*(f"{folder}:{folder}" for folder in folders), *container.bind]
    if parted := next((mount for mount in mounts if "," in mount), None):
        raise RecipeError(f"container: {parted!r} has a comma, at which pyxis would split it: rename the folder")
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={Path.cwd()}",
    ]


def _nameable(path: Path, log: str) -> Path:
    """Return the path of a log if sbatch takes it literally; it interprets quotes, backslashes and
    % in its own way."""
    if any(sign in str(path).removesuffix(log) for sign in "'\"\\%"):
        raise RecipeError(
            f"run folder {path.parent}: SLURM cannot write a log there, because of a quote, '\\' or '%' in it: rename it"
        )
    return path


def plain(what: str, value: str, pattern: re.Pattern[str]) -> str:
    """Return a value that needs no quotes."""
    _sound(what, value)
    if not pattern.fullmatch(value):
        raise RecipeError(f"{what} {value!r} cannot be in a job's script: it must match {pattern.pattern}")
    return value


def quoted(what: str, value: str | Path) -> str:
    """Return a value as one word of a bash command."""
    return shlex.quote(_sound(what, str(value)))


def _sound(what: str, value: str) -> str:
    if not value.isprintable():
        raise RecipeError(f"{what} {value!r} has a control character or line break: no such value goes into a job's script")
    if "#SBATCH" in value.upper():
        raise RecipeError(f"{what} {value!r} holds #SBATCH: no such value goes into a job's script")
    if holds_secret(value):
        raise _secret(what)
    return value


def _secret(what: str) -> RecipeError:
    return RecipeError(
        f"{what} holds a secret, which the job's script and the command lines of its ranks would show: write it into the "
        "recipe file, which only they read, or into a variable that the site's `export` names"
    )


def write_script(order: Order, text: str) -> Path:
    """Write the script into the run folder, readable by its owner alone.

    RecipeError if it cannot be written, or if another file of that name is there.
    """
    path = order.run_dir / SCRIPT
    draft = path.with_name(f".{SCRIPT}.tmp")
    try:
        if path.exists() and OURS not in read_text(path, RECIPE_BYTES):
            raise RecipeError(f"{path}: `triaxis submit` did not write it, and does not overwrite it: rename it")
        make_private(order.run_dir)
        with private_file(draft) as file:
            file.write(text.encode())
        draft.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {told(error)}: choose a run folder that can be written (--run-dir)") from error
    return path


def rehearse(script: Path, site: Site) -> str:
    """Return a line from SLURM about when and where it would start the job, or a warning that it
    sees no place for it.

    That may pass (nodes that are down) or not: sbatch accepts a job for more nodes than there are,
    and lets it wait for ever.
    """
    done = _sbatch("--test-only", script, site)
    said = " ".join(done.stderr.split()).removeprefix("sbatch: ")
    return said if done.returncode == 0 else f"warning: SLURM has no place for this job as things are: {said}"


def hand_in(script: Path, site: Site) -> str:
    """Submit the script and return the job's id. RecipeError if sbatch refuses it."""
    done = _sbatch("--parsable", script, site)
    if done.returncode != 0:
        raise RecipeError(f"sbatch refused {script}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip().partition(";")[0]


def _sbatch(option: str, script: Path, site: Site) -> subprocess.CompletedProcess[str]:
    """Run sbatch with no more environment than the job gets, because SBATCH_… variables would
    override the script."""
    environment = {name: os.environ[name] for name in (*EXPORTED, *site.export) if name in os.environ}
    command = ["sbatch", option, str(script)]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SBATCH_ANSWERS_S, check=False)
    except FileNotFoundError:
        raise RecipeError(
            f"sbatch is not on this machine: submit on a login node, `sbatch {shlex.quote(str(script))}`"
        ) from None
    except subprocess.TimeoutExpired:
        raise RecipeError(
            f"sbatch did not answer in {SBATCH_ANSWERS_S} s: is it queued (squeue)? else submit {script}"
        ) from None
