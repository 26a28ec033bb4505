"""sbatch scripts: what is in them, what may not be, and that bash reads back what was given."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import write_recipe
from trainer.checkpoint.folder import CheckpointFolder
from trainer.cli import main
from trainer.cluster import requeue
from trainer.cluster.submit import (
    EXPORTED,
    Container,
    Order,
    Site,
    hand_in,
    read_site,
    read_sweep,
    render,
    template_names,
    write_script,
)
from trainer.errors import RecipeError
from trainer.run_folder import RunFolder

ORDER = Order(
    recipe=Path("/r/recipe.json"),
    run_dir=Path("/r/run"),
    name="mine",
    nodes=2,
    ranks_per_node=2,
    template="multi-node",
    time="01:00:00",
    grace_s=90,
)
RECIPES = Path(__file__).parents[2] / "ds_configs"
LARGE, SMALL = RECIPES / "llama_70b_3d.json", RECIPES / "gpt2_pretrain.json"
TEMPLATES = ("array", "container", "debug", "multi-node", "preemptible", "single-node", "torchrun")


def order_of(template: str, **changes: Any) -> tuple[Order, Site]:
    order = replace(ORDER, template=template, **changes)
    site = Site(container=Container(image="/i/image.sif", bind=["/data:/data"])) if template == "container" else Site()
    if template == "single-node":
        order = replace(order, nodes=1)
    if template == "debug":
        order = replace(order, time="00:30:00")
    if template == "array":
        order = replace(order, sweep=(("run.seed=1",), ("run.seed=2", "optimizer.lr=0.1")))
    return order, site


def directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def refused(order: Order, site: Site) -> str:
    with pytest.raises(RecipeError) as caught:
        render(order, site)
    assert len(caught.value.lines) == 1
    return caught.value.lines[0]


def test_the_templates_are_these() -> None:
    assert template_names() == sorted(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_script_is_bash_and_warns_in_time(template: str, tmp_path: Path) -> None:
    script = render(*order_of(template))
    path = tmp_path / "job"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)], check=False, capture_output=True, text=True).stderr == ""
    lines = directives(script)
    assert "#SBATCH --signal=B:USR1@90" in lines
    assert "#SBATCH --open-mode=append" in lines
    assert ("#SBATCH --requeue" in lines) == (template != "debug") == ("scontrol requeue" in script)
    assert not any(line.startswith("#SBATCH") for line in script.splitlines()[script.splitlines().index("umask 077") :])
    assert "SIGCONT" not in script.split("trap")[1]
    assert "{{" not in script
    assert "{%" not in script


def test_a_task_of_an_array_queues_only_itself() -> None:
    script = render(*order_of("array"))
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in script
    assert "#SBATCH --array=0-1" in script
    assert "1) run=/r/run/task-1 settings=(--set run.seed=2 --set optimizer.lr=0.1) ;;" in script


SMUGGLED = [
    *(
        "x\n#SBATCH --uid=0",
        "x\r#SBATCH --uid=0",
        "x\u2028#SBATCH",
        "a\tb",
        "a\x1b[0m",
        "a\x00b",
        "#SBATCH --x",
        "x #sbatch",
        "\u202ex",
    ),
]


@pytest.mark.parametrize("value", SMUGGLED)
@pytest.mark.parametrize(
    "where", ["name", "run_dir", "recipe", "settings", "partition", "account", "modules", "environment", "bind"]
)
def test_no_value_smuggles_a_line(value: str, where: str) -> None:
    order, site = order_of("container" if where == "bind" else "multi-node")
    if where in ("name", "run_dir", "recipe", "settings"):
        order = replace(order, **{where: {"name": value, "settings": (value,)}.get(where, Path("/r") / value)})
    elif where == "bind":
        site = Site(container=Container(image="/i.sif", bind=[value]))
    else:
        site = Site.model_validate({where: {"modules": [value], "environment": {"A": value}}.get(where, value)})
    assert "job's script" in refused(order, site)


INJECTED = [
    *(
        "$(touch A)",
        "`touch A`",
        "; touch A",
        "| touch A",
        "&& touch A",
        "> A",
        "x' ; touch A; '",
        'x"; touch A; "',
        "*",
        "${HOME}",
    ),
    *("\\", "-oProxyCommand=touch A", "!touch A", "a b", "~", "{a,b}", "ü", "--", "'", '"'),
]


@pytest.mark.parametrize("value", INJECTED)
def test_bash_reads_back_what_was_given_and_runs_nothing(value: str, tmp_path: Path) -> None:
    """With every command of the script replaced by one that shows its words."""
    cannot_be_logged = any(sign in value for sign in "'\"\\%")
    folder = tmp_path / ("run" if cannot_be_logged or "/" in value else f"run {value}")
    order = replace(
        ORDER, run_dir=folder, recipe=tmp_path / f"recipe {value.replace('/', '_')}", settings=(f"run.dir={value}",)
    )
    script = render(order, Site(environment={"GIVEN": value}))
    seen = run_in_sandbox(script, tmp_path)
    after = seen["srun"][seen["srun"].index("train") + 1 :]
    assert after == [str(order.recipe), "--run-dir", str(folder), "--set", f"run.dir={value}", f"GIVEN={value}"]
    assert not (tmp_path / "A").exists()
    assert not Path("A").exists()


def run_in_sandbox(script: str, folder: Path) -> dict[str, list[str]]:
    """The words that srun got, and the environment's GIVEN after them."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("srun", "scontrol"):
        tool = tools / name
        tool.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" "GIVEN=$GIVEN" >{shlex.quote(str(folder / name))}.words\n')
        tool.chmod(0o700)
    # The helper that judges needs no sandbox; the current folder is where a payload would write.
    script = script.replace(f"cd -- {shlex.quote(str(Path.cwd()))}", f"cd -- {shlex.quote(str(folder))}")
    path = folder / "job"
    path.write_text(script)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    subprocess.run(["bash", str(path)], env=environment, check=False, capture_output=True, timeout=60)
    return {"srun": (folder / "srun.words").read_bytes().decode().split("\0")[:-1]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("partition", value) for value in ("a b", "$(x)", "-p", "'a'", "")),
        *(("account", value) for value in ("a;b", "../x y")),
        *(("constraint", value) for value in ("a`b`", "a b", "'a'")),
        *(("modules", [value]) for value in ("a b", "cuda;x", "-f")),
        *(("environment", {value: "x"}) for value in ("A B", "1A", "A=1", "")),
        *(("export", [value]) for value in ("ALL,X", "A=1", "A B")),
        ("memory", "64 G"),
    ],
)
def test_what_a_directive_cannot_hold_is_refused(key: str, value: Any) -> None:
    assert "cannot be in a job's script" in refused(ORDER, Site.model_validate({key: value}))


@pytest.mark.parametrize("sign", ["'", '"', "\\", "%"])
def test_a_log_that_slurm_would_name_otherwise(sign: str) -> None:
    assert "SLURM cannot write a log there" in refused(replace(ORDER, run_dir=Path(f"/r/a{sign}b")), Site())


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "MY_SECRET", "db_password", "APIKEY"])
def test_no_secret_is_written_into_a_script(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give the name in `export`" in refused(ORDER, Site(environment={name: "hunter2"}))
    monkeypatch.setenv(name, "hunter2")
    assert name not in render(ORDER, Site())
    script = render(ORDER, Site(export=[name]))
    assert name in script
    assert "hunter2" not in script
    assert name not in EXPORTED


@pytest.mark.parametrize(
    ("order", "site", "what"),
    [
        (ORDER, Site(environment={"HTTPS_PROXY": "http://me:hunter2@proxy:3128"}), "environment.HTTPS_PROXY"),
        (ORDER, Site(modules=["a", "ghp_" + "hunter2" * 6]), "modules"),
        (replace(ORDER, settings=("data.sources[0].path=https://me:hunter2@host/",)), Site(), "--set data.sources[0].path"),
        (replace(ORDER, settings=("model.config.api_key=hunter2",)), Site(), "--set model.config.api_key"),
        (replace(ORDER, template="array", sweep=(("a.token=hunter2",),)), Site(), "--set a.token"),
        (
            replace(ORDER, template="container"),
            Site(container=Container(image="docker://me:hunter2@registry/image")),
            "container",
        ),
    ],
)
def test_a_secret_in_any_value_is_refused_without_being_said(order: Order, site: Site, what: str) -> None:
    said = refused(order, site)
    assert said.startswith(f"{what} holds a secret")
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "multinode"}, "did you mean multi-node?"),
        ({"template": "../base"}, "--template ../base: not in"),
        ({"template": "base"}, "--template base: not in"),
        ({"time": "1 hour"}, "--time '1 hour' is not a duration"),
        ({"time": "00:00:00"}, "is not a duration"),
        ({"time": "00:01:00"}, "--grace 90 seconds must be less than --time 00:01:00"),
        ({"template": "debug"}, "legal is up to 00:30:00"),
        ({"template": "array"}, "--sweep FILE and --template array go together"),
        ({"sweep": (("a=1",),)}, "--sweep FILE and --template array go together"),
        ({"template": "container"}, 'needs "container" in the --site file'),
        ({"template": "single-node"}, "legal is 1; use multi-node"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes: dict[str, Any], says: str) -> None:
    assert says in refused(replace(ORDER, **changes), Site())


def test_more_ranks_than_gpus() -> None:
    assert "the site's gpus_per_node is 1" in refused(ORDER, Site(gpus_per_node=1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"partiton": "a"}', "did you mean partition?"),
        ('{"gpus_per_node": "8"}', "gpus_per_node: Input should be a valid integer"),
        ('{"partition": "a", "partition": "b"', "not JSON"),
        ("[1]", "Input should be"),
    ],
)
def test_a_wrong_site_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "site.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_site(path)
    assert len(caught.value.lines) == 1
    assert says in caught.value.lines[0]


@pytest.mark.parametrize("text", ["", "run.seed=1", '["a=1", 2]', '{"a": 1}'])
def test_a_wrong_sweep_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    path.write_text(text)
    with pytest.raises(RecipeError, match="--sweep"):
        read_sweep(path)


def test_pyxis_gets_the_folders_of_the_run_and_the_site_s() -> None:
    site = Site(container=Container(runtime="pyxis", image="nvcr.io#a/b:1", bind=["/data:/data"]))
    script = render(replace(ORDER, template="container"), site)
    here = Path.cwd()
    mounts = f"{here}:{here},{ORDER.run_dir}:{ORDER.run_dir},{ORDER.recipe.parent}:{ORDER.recipe.parent},/data:/data"
    words = shlex.split(next(line for line in script.splitlines() if "--container-image" in line))
    assert words[:3] == ["--container-image=nvcr.io#a/b:1", f"--container-mounts={mounts}", f"--container-workdir={here}"]
    assert words[3:6] == ["python3", "-m", "trainer"]
    assert "apptainer" not in script
    parted = Site(container=Container(runtime="pyxis", image="i", bind=["/a,b:/c"]))
    assert "has a comma" in refused(replace(ORDER, template="container"), parted)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, steps=6, every=2, keep=2)


def test_a_dry_run_prints_what_it_wrote_for_the_owner_alone(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(recipe), "--nodes", "2", "--ranks-per-node", "2", "--dry-run"]) == 0
    script = recipe.parent / "campaign" / "job.sbatch"
    assert capsys.readouterr().out == script.read_text()
    assert stat.S_IMODE(script.stat().st_mode) == 0o600


def test_a_recipe_that_cannot_run_there_is_refused_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(recipe), "--nodes", "3", "--ranks-per-node", "1", "--dry-run"]) == 78
    assert "--nodes × --ranks-per-node" in capsys.readouterr().err
    assert main(["submit", str(recipe), "--nodes", "1", "--ranks-per-node", "1", "--set", "train.stepz=1"]) == 78
    assert not (recipe.parent / "campaign").exists()


def test_a_folder_that_cannot_be_made_is_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ("--run-dir", str(tmp_path / "file" / "run"), "--dry-run")
    assert main(["submit", str(recipe), "--nodes", "1", "--ranks-per-node", "1", *words]) == 78
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith("Not a directory: choose a run folder that can be written (--run-dir)")


def test_what_its_owner_may_want_to_change_is_said_before_it_waits(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(tmp_path, "sbatch", "echo 'allocation failure: no such node' >&2; exit 1")
    words = ["submit", str(recipe), "--nodes", "1", "--ranks-per-node", "1", "--dry-run"]
    assert main(words) == 0
    data, place = capsys.readouterr().err.splitlines()
    assert data.startswith("triaxis: the data is not tokenized yet")
    assert place == "triaxis: warning: SLURM has no place for this job as things are: allocation failure: no such node"

    assert main(["data", "prepare", str(recipe)]) == 0
    fake(tmp_path, "sbatch", "echo 'sbatch: Job 7 to start at noon' >&2")
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().err == "triaxis: Job 7 to start at noon\n"

    assert main([*words, "--set", "checkpoint.every=0"]) == 0
    assert "the run cannot be resumed" in capsys.readouterr().err
    monkeypatch.setattr(CheckpointFolder, "free_bytes", lambda _: 10)
    assert main(words) == 0
    assert "has 0.0 MB free; make room" in capsys.readouterr().err


def of_site(folder: Path, device: str) -> list[str]:
    site = folder / f"{device}.json"
    site.write_text(json.dumps({"device": device}))
    return ["--site", str(site), "--run-dir", str(folder / "run"), "--dry-run"]


def test_what_does_not_fit_the_sites_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", str(LARGE), "--nodes", "8", "--ranks-per-node", "8", *of_site(tmp_path, "rtx4090")]
    assert main(words) == 78
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("triaxis: error: does not fit: ")
    assert said[-1] == "triaxis: error: --no-plan-check submits it all the same"
    assert not (tmp_path / "run").exists()

    assert main([*words, "--no-plan-check"]) == 0
    assert capsys.readouterr().err.startswith("triaxis: warning: does not fit: ")
    (line,) = [line for line in (tmp_path / "run" / "job.sbatch").read_text().splitlines() if " -m trainer train " in line]
    assert " --no-plan-check " in line


def test_a_layout_that_is_beaten_by_far_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of 110 M parameters loses on eight tensor ranks what it gains; what is named is a recipe that is legal."""
    words = [str(SMALL), "--set", "parallel.tensor=4"]
    order = ["--nodes", "1", "--ranks-per-node", "8", *of_site(tmp_path, "h100-80g")]
    assert main(["submit", *words, *order]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " faster by the plan, " in line]
    named = shlex.split(line.split(": ")[-1])
    assert main(["check", *words, *named, "--world-size", "8"]) == 0
    capsys.readouterr()
    assert main(["submit", *words, *named, *order]) == 0
    assert "faster by the plan" not in capsys.readouterr().err


def test_a_site_whose_device_has_no_sheet_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(SMALL), "--nodes", "1", "--ranks-per-node", "1", *of_site(tmp_path, "h100")]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("triaxis: error: the site's device h100: no sheet has this name; did you mean h100-80g?")


def test_a_run_that_has_ended_is_not_submitted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe)]) == 0
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    words = ["submit", str(recipe), "--nodes", "1", "--ranks-per-node", "1"]
    capsys.readouterr()
    assert main(words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*words, "--set", "model.config.n_layer=3"]) == 78
    assert "model.config" in capsys.readouterr().err


def fake(folder: Path, name: str, body: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/bash\n{body}\n")
    tool.chmod(0o700)


def test_sbatch_gets_an_allow_list_and_no_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "sbatch", f'/usr/bin/env >{tmp_path}/environment; printf "%s\\n" "$@" >{tmp_path}/words; echo "12;cluster"')
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("WANDB_API_KEY", "SBATCH_EXPORT", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("MINE", "passed")
    script = write_script(replace(ORDER, run_dir=tmp_path / "run"), "x")
    assert hand_in(script, Site(export=["MINE"])) == "12"
    environment = (tmp_path / "environment").read_text()
    assert "hunter2" not in environment
    assert "MINE=passed" in environment
    assert (tmp_path / "words").read_text().splitlines() == ["--parsable", str(script)]


def test_without_sbatch_or_when_it_refuses_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="sbatch is not on this machine"):
        hand_in(tmp_path / "job", Site())
    fake(tmp_path, "sbatch", "echo 'invalid partition specified: x' >&2; exit 1")
    with pytest.raises(RecipeError, match=r"sbatch refused .*invalid partition"):
        hand_in(tmp_path / "job", Site())


# --------------------------------------------------------------------------------------------------- shall it be queued again?


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `squeue` that says what is in the file of that name: RUNNING."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "restarts").write_text("0")
    fake(tools, "squeue", f'echo "$@" >{tmp_path}/asked; echo "$(cat {tmp_path}/state)|$(cat {tmp_path}/restarts)|"')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


def reach(folder: RunFolder, step: int) -> None:
    CheckpointFolder(folder.checkpoints).of_step(step).mkdir(parents=True)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, 0),
        (65, 65),
        (70, 70),
        (75, 75),
        (78, 78),
        (93, 93),
        (124, 75),
        (130, 130),
        (137, 75),
        (138, 75),
        (143, 75),
        (1, 1),
        (127, 127),
    ],
)
def test_only_an_interrupted_run_is_queued_again(code: int, expected: int, running: Path) -> None:
    got, why = requeue.verdict(RunFolder(running / "run"), code, 0, {"SLURM_JOB_ID": "1"})
    assert got == expected
    assert ("not queued again" in why) == (expected != 75)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", "TIMEOUT"])
def test_a_job_that_slurm_ends_is_left_to_it(state: str, running: Path) -> None:
    (running / "state").write_text(state)
    assert requeue.verdict(RunFolder(running / "run"), 75, 0, {"SLURM_JOB_ID": "1"})[0] == 143


def test_ranks_that_slurm_has_lost_leave_the_job_to_its_next_start(running: Path) -> None:
    """Their script lives on beside them: a requeue by it would end that start."""
    folder = RunFolder(running / "run")
    (running / "restarts").write_text("1")
    code, why = requeue.verdict(folder, 75, 0, {"SLURM_JOB_ID": "1"})
    assert (code, why.partition(", ")[2]) == (143, "SLURM has started the job again meanwhile: left to that start")
    assert not (folder.path / requeue.RECORD).exists()
    assert requeue.verdict(folder, 75, 0, {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"})[0] == 75


def test_three_restarts_without_a_later_checkpoint_end_it(running: Path) -> None:
    folder = RunFolder(running / "run")

    def ends(job: str = "1") -> int:
        return requeue.verdict(folder, 75, 0, {"SLURM_JOB_ID": job})[0]

    assert [ends() for _ in range(4)] == [75, 75, 75, 93]
    assert ends(job="2") == 75, "a new job begins to count anew"
    reach(folder, 5)
    assert [ends(job="2") for _ in range(4)] == [75, 75, 75, 93]
    reach(folder, 6)
    assert ends(job="2") == 75
    (folder.path / requeue.RECORD).write_text("{torn")
    assert ends(job="2") == 75


def test_an_array_asks_for_its_own_task(running: Path) -> None:
    environment = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert requeue.verdict(RunFolder(running / "run"), 75, 0, environment)[0] == 75
    assert "--jobs=7_1" in (running / "asked").read_text()


def test_torchrun_ends_with_1_and_the_run_folder_says_why(running: Path) -> None:
    folder = RunFolder(running / "run")
    reach(folder, 5)
    summary = folder.path / "summary.json"
    summary.write_text(json.dumps({"ended_by": "SIGUSR1", "steps": 5}))
    now = int(summary.stat().st_mtime)
    environment = {"SLURM_JOB_ID": "1"}
    assert requeue.verdict(folder, 1, now, environment)[0] == 75
    assert requeue.verdict(folder, 1, now + 10, environment)[0] == 1, "that was an earlier job"
    (folder.path / "logs").mkdir()
    (folder.path / "logs" / "autopsy-20260101T000000.txt").write_text("rank 1 is gone")
    assert requeue.verdict(folder, 1, now, environment)[0] == 75
    assert requeue.verdict(folder, 1, now + 10, environment)[0] == 1
    (folder.path / "logs" / "autopsy-20260101T000000.txt").unlink()
    summary.write_text(json.dumps({"ended_by": "SIGUSR1", "steps": 7}))
    assert requeue.verdict(folder, 1, now, environment)[0] == 1, "not saved"
    summary.write_text(json.dumps({"steps": 5}))
    assert requeue.verdict(folder, 1, now, environment)[0] == 1


def test_a_script_of_somebody_else_is_not_written_over(tmp_path: Path) -> None:
    order, site = order_of("single-node", run_dir=tmp_path / "run")
    script = write_script(order, text := render(order, site))
    assert write_script(order, text) == script, "one of ours is"
    for content in (b"#!/bin/sh\nmy own job\n", b"\xff\xfe"):
        script.write_bytes(content)
        with pytest.raises(RecipeError, match=r"job\.sbatch"):
            write_script(order, text)
        assert script.read_bytes() == content
