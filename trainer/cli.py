"""The commands. Each imports what it needs when it runs, so that `check` starts in a fraction of a second."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.errors import EXIT_DATA, EXIT_DIFFERS, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, RecipeError, UserError
from trainer.redaction import RedactedRecord, redact, redact_text

if TYPE_CHECKING:
    from rich.console import Console

    from parallel.simulator import Costs
    from trainer.evaluation import Request
    from trainer.model.config import TransformerConfig
    from trainer.recipe import ResolvedRecipe

DEFAULT_COLUMNS = 160  # of a pipe, where there is no terminal to ask


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit codes are in `errors.py`."""
    logging.setLogRecordFactory(RedactedRecord)  # libraries have loggers and handlers of their own
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except UserError as error:
        for line in error.lines:
            sys.stderr.write(f"triaxis: error: {line}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("triaxis: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left (`triaxis check R | head`); nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:
        sys.stderr.write(redact_text(traceback.format_exc()))
        return EXIT_INTERNAL


class _Parser(argparse.ArgumentParser):
    """Reports a wrong word like a wrong recipe: one line, the nearest legal word, exit 78."""

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument .*: invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if choice:
            names = re.findall(r"[\w-]+", choice.group(2))
            message = f"unknown command {choice.group(1)}{_did_you_mean(choice.group(1), names)}; legal: {', '.join(names)}"
        raise RecipeError(f"{message} (see {self.prog} --help)")

    def flags(self) -> list[str]:
        """The long flags of this parser and of the commands in it."""
        found = []
        for action in self._actions:
            found += [flag for flag in action.option_strings if flag.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found


def _did_you_mean(word: str, names: list[str]) -> str:
    from trainer.spelling import nearest

    meant = nearest(word, names)
    return f"; did you mean {meant}?" if meant else ""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="triaxis", description="3D-parallel training of transformers on DeepSpeed.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, run: Any, summary: str, *, into: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = into.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "Train; start it alone, or under the deepspeed launcher, torchrun or srun.")
    _add_recipe(train)
    train.add_argument("--run-dir", metavar="DIR", help="the run folder; default: run.dir/run.name")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="HOW",
        help="auto (default): go on from the run's newest whole checkpoint, if it has any; never: a new run, an old one of the "
        "same name moves aside; or a checkpoint's folder",
    )
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        choices=("precision", "optimizer", "tokenizer", "data"),
        help="let this differ from what the checkpoint was saved with; may be repeated",
    )

    check = command("check", _check, "Validate a recipe and show every value with its origin; needs no GPU and no torch.")
    _add_recipe(check)
    check.add_argument("--world-size", type=_whole(1), metavar="N", help="also check the batch arithmetic for N ranks")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")

    verify = command(
        "verify",
        _verify,
        "Train a few steps in one process and in other layouts on this machine: are they the same training? Exit 1 if not.",
    )
    _add_recipe(verify)
    verify.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="LAYOUT",
        help="such as tp2 dp4 tp2xdp2 tp2-sp (without sequence parallelism); default: all of up to 4 processes, or 8 where "
        "there are as many cores or GPUs, that divide the model",
    )
    verify.add_argument("--full", action="store_true", help="the recipe's own sizes instead of a scaled-down twin")
    verify.add_argument("--timeout", type=_whole(1), default=600, metavar="S", help="for each layout, in seconds")

    schedule = command("schedule", _schedule, "Draw a recipe's pipeline: who works when, bubbles, micro-batches in flight.")
    _add_recipe(schedule)
    schedule.add_argument("--gpus", type=_whole(1), metavar="N", help="default: one data-parallel replica")
    schedule.add_argument(
        "--costs",
        type=_costs,
        default="1,1,1",
        metavar="F,I,W",
        help="one stage's forward, gradient of its input and gradient of its weights, in any unit of time",
    )
    schedule.add_argument("--latency", type=_number, default=0.0, metavar="T", help="of a message between ranks, in that unit")
    schedule.add_argument("--out", type=Path, metavar="FILE", help="a picture (.svg, .png), or the table of actions (.csv)")

    command("schema", _schema, "Print the JSON Schema of a recipe, for editors.")

    report = command("report", _report, "Write report.html into a run folder.")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")

    checkpoints = command("checkpoints", _checkpoints, "List a run's checkpoints; verify every byte of them; remove old ones.")
    checkpoints.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    checkpoints.add_argument("--verify", action="store_true", help="read and hash all files; exit 65 if one is damaged")
    checkpoints.add_argument("--prune", type=_whole(1), metavar="KEEP", help="verify the newest, then keep only so many")

    export = command("export", _export, "Write a checkpoint's weights as a Hugging Face folder, in one process.")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's for its newest")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the format of training")
    export.add_argument(
        "--merge",
        action="store_true",
        help="of a tuned model: all of it, what was learned added, instead of an adapter for peft",
    )
    export.add_argument("--verify", action="store_true", help="also compare logits: training network against transformers")

    generate = command("generate", _generate, "Continue a text with an exported model, or with a checkpoint's weights.")
    generate.add_argument("folder", type=Path, metavar="FOLDER", help="a Hugging Face folder, such as RUN_DIR/export")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=_whole(1), default=64, metavar="N")
    generate.add_argument("--temperature", type=_number, default=0.8, metavar="T", help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=_whole(1), default=50, metavar="K", help="sample among the K likeliest")
    generate.add_argument("--seed", type=_whole(0), default=0, metavar="S")
    generate.add_argument(
        "--beams", type=_whole(1), default=4, metavar="N", help="of a translation; 1 takes the likeliest token"
    )
    generate.add_argument("--length-penalty", type=_number, default=1.0, metavar="A", help="of a translation's beams")
    generate.add_argument("--attention", type=Path, metavar="FILE.png", help="draw where a translation's tokens look")

    evaluation = command(
        "eval", _eval, "Measure a checkpoint or a Hugging Face folder on data; alone or under a launcher, in any layout."
    )
    evaluation.add_argument("weights", metavar="WEIGHTS", help="a checkpoint's folder, a run's, or a Hugging Face folder")
    evaluation.add_argument("files", nargs="*", metavar="FILE", help="default: what the run held out")
    evaluation.add_argument(
        "--target", metavar="FILE", help="of a translation, where FILE has one text on a line: the other side"
    )
    evaluation.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe that the weights were saved with, as in --set parallel.tensor=2, which is 1 otherwise",
    )
    evaluation.add_argument(
        "--sequences", type=_whole(1), metavar="N", help="at most; default: all of FILE; of the harness: examples of each task"
    )
    evaluation.add_argument(
        "--translations", type=_whole(0), metavar="N", help="texts to translate for BLEU and chrF; default: all; 0: none"
    )
    evaluation.add_argument(
        "--harness", action="append", metavar="TASK", help="a task of lm-evaluation-harness, in place of FILE; may be repeated"
    )
    evaluation.add_argument("--harness-path", type=Path, metavar="DIR", help="with tasks of your own for --harness")
    evaluation.add_argument("--few-shot", type=_whole(0), metavar="N", help="examples before each question of --harness")
    evaluation.add_argument("--chat", action="store_true", help="write the questions of --harness as conversations")
    evaluation.add_argument("--json", action="store_true", help="print JSON instead of a table")

    submit = command("submit", _submit, "Write the sbatch script of a recipe for N nodes, check it, and hand it in to SLURM.")
    _add_recipe(submit)
    submit.add_argument("--nodes", type=_whole(1), required=True, metavar="N")
    submit.add_argument("--ranks-per-node", type=_whole(1), required=True, metavar="R", help="one for each GPU")
    submit.add_argument("--template", metavar="NAME", help="of slurm/; default: single-node, or multi-node with several nodes")
    submit.add_argument("--site", type=Path, metavar="FILE", help="partition, account, modules, … as JSON; see slurm/README.md")
    submit.add_argument("--time", default="00:30:00", metavar="HH:MM:SS", help="of one job, which is queued again until done")
    submit.add_argument("--grace", type=_whole(1), default=120, metavar="S", help="to save in, before the time is over")
    submit.add_argument(
        "--sweep", type=Path, metavar="FILE", help="for --template array: a JSON list of KEY=VALUE on each line"
    )
    submit.add_argument("--run-dir", metavar="DIR", help="the run folder; default: run.dir/run.name")
    submit.add_argument("--dry-run", action="store_true", help="write and print the script; submit nothing")

    data = commands.add_parser("data", help="Prepare or inspect tokenized data.", allow_abbrev=False)
    actions = data.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    _add_recipe(command("prepare", _data_prepare, "Tokenize a recipe's sources now, before a queue.", into=actions))
    inspect = command("inspect", _data_inspect, "Show and verify a folder of tokenized data.", into=actions)
    inspect.add_argument("folder", type=Path, metavar="FOLDER")

    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        flags = commands.choices[arguments.command].flags()
        parser.error(f"unknown argument {word}{_did_you_mean(word, flags) if word.startswith('-') else ''}")
    return arguments


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a JSON file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, as in --set train.steps=10; may be repeated",
    )


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


def _number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)


def _costs(text: str) -> Costs:
    from parallel.simulator import Costs

    durations = [_number(part) for part in text.split(",")]
    if len(durations) != 3 or min(durations) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not three durations above 0, as in 1,1,1")
    forward, input_grad, weight_grad = durations
    return Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad)


def _train(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.door import Resume, finished
    from trainer.lifecycle import StopRequest
    from trainer.recipe import load
    from trainer.slurm_environment import speaks_first

    stop = StopRequest()
    stop.listen()
    resume = Resume(arguments.resume, tuple(arguments.allow_change))
    try:
        resolved = load(arguments.recipe, arguments.set)
        done = finished(resolved, arguments.run_dir, resume)
    except UserError as error:
        if not speaks_first(os.environ):
            return error.exit_code  # rank 0 reads the same files and says what is wrong with them
        raise
    if done:
        if speaks_first(os.environ):
            _say(_console(), done)
        return EXIT_OK
    # Else torch's C++ writes 25 lines of frames to stderr when a peer is gone; we say it in one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from trainer.loop import train

    return train(resolved, arguments.run_dir, resume, stop)


def _check(arguments: argparse.Namespace) -> int:
    from trainer.batching import BatchPlan
    from trainer.deepspeed_config import deepspeed_config
    from trainer.model.config import largest_weight
    from trainer.recipe import load
    from trainer.recipe.pipeline import check_micro_batches

    resolved = load(arguments.recipe, arguments.set)
    network = _network(resolved)
    plan = config = None
    if arguments.world_size is not None:
        plan = BatchPlan.from_recipe(resolved.recipe, arguments.world_size, "--world-size")
        check_micro_batches(resolved.recipe, plan)
        largest = largest_weight(network) if network is not None else None
        config = deepspeed_config(resolved.recipe, plan, largest_weight=largest)
    if arguments.json:
        sys.stdout.write(json.dumps(resolved.as_resolved_json(config), indent=2) + "\n")
        return EXIT_OK
    console = _console()
    _show_values(console, resolved)
    console.print()
    _show_model(console, resolved, network)
    _show_stages(console, resolved, network)
    if plan is not None:
        _say(
            console,
            f"step: {plan.global_sequences} sequences = micro {plan.micro_sequences} × data-parallel {plan.dp} × "
            f"{plan.num_micro_batches} micro-batches; {plan.tokens_per_step:,} tokens",
        )
        _say(console, "DeepSpeed gets:")
        _say(console, json.dumps(redact(config), indent=2))
    return EXIT_OK


def _network(resolved: ResolvedRecipe) -> TransformerConfig | None:
    """The network, as far as it is known without opening the tokenizer, the hub or transformers."""
    from trainer.recipe import tokenizer_vocab_size
    from trainer.recipe.auto import AUTO

    if resolved.recipe.model.family == AUTO:
        return None
    vocab_size = tokenizer_vocab_size(resolved.recipe.data)
    known = resolved.hf_config is not None and (vocab_size is not None or "vocab_size" in resolved.hf_config)
    return resolved.network(vocab_size=vocab_size) if known else None


def _console() -> Console:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, markup=False, emoji=False, width=None if terminal else DEFAULT_COLUMNS)


def _say(console: Console, text: str) -> None:
    console.print(redact_text(text), soft_wrap=True)


def _show_values(console: Console, resolved: ResolvedRecipe) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("key", "value", "origin"):
        table.add_column(title, overflow="fold")
    for key, entry in resolved.as_resolved_json()["values"].items():
        style = "dim" if entry["origin"] == "default" else ""
        shown = json.dumps(entry["value"])  # escapes control characters, so that a recipe cannot drive the terminal
        table.add_row(*(Text(cell, style=style) for cell in (key, shown, entry["origin"])))
    console.print(table)


def _show_model(console: Console, resolved: ResolvedRecipe, network: TransformerConfig | None) -> None:
    from trainer.model.costs import count_parameters
    from trainer.recipe.auto import AUTO

    if network is None and resolved.hf_config is not None and resolved.recipe.model.family == AUTO:
        _say(console, f"model: {resolved.hf_config['model_type']}, as transformers builds it when training starts")
        return
    if network is None:
        _say(console, f"model: known once {_missing_part(resolved)} is opened")
        return
    _say(
        console,
        f"model: {network.family}, {count_parameters(network):,} parameters: {network.num_layers} layers, hidden "
        f"{network.hidden_size}, {network.num_heads} heads, vocabulary {network.vocab_size:,}",
    )


def _show_stages(console: Console, resolved: ResolvedRecipe, network: TransformerConfig | None) -> None:
    if resolved.recipe.parallel.pipeline == 1:
        return
    if network is None:
        _say(console, f"stages: known once {_missing_part(resolved)} is opened")
        return
    from trainer.timeline import division

    for line in division(resolved.recipe, network):
        _say(console, line)


def _missing_part(resolved: ResolvedRecipe) -> str:
    if resolved.hf_config is None:
        return f"model.from_pretrained {json.dumps(resolved.recipe.model.from_pretrained)}"
    return f"data.tokenizer {json.dumps(resolved.recipe.data.tokenizer)}"


def _verify(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load

    resolved = load(arguments.recipe, arguments.set)
    from trainer.verify.command import STEPS, verify
    from trainer.verify.table import legend, table

    console = _console()
    with console.status("one process") as status:
        report = verify(
            resolved, arguments.layouts, full=arguments.full, timeout_s=arguments.timeout, say=lambda text: status.update(text)
        )
    for change in report.changes:
        _say(console, change)
    console.print(table(report))
    for line in legend(resolved.recipe.optimizer.name, resolved.recipe.zero.stage, STEPS):
        _say(console, line)
    return EXIT_OK if report.agrees else EXIT_DIFFERS


def _schedule(arguments: argparse.Namespace) -> int:
    from parallel.simulator import simulate
    from trainer.batching import BatchPlan
    from trainer.recipe import load
    from trainer.recipe.pipeline import schedule_table
    from trainer.timeline import check_size, draw, save, summary

    resolved = load(arguments.recipe, arguments.set)
    recipe, parallel = resolved.recipe, resolved.recipe.parallel
    if parallel.pipeline == 1:
        raise RecipeError("parallel.pipeline = 1: there is no pipeline to draw; legal: 2 or more")
    replica = parallel.tensor * parallel.pipeline * parallel.context
    plan = BatchPlan.from_recipe(recipe, arguments.gpus or replica, "--gpus")
    check_size(parallel.pipeline * parallel.virtual_stages, plan.num_micro_batches)
    table, network = schedule_table(recipe, plan), _network(resolved)
    timeline = simulate(table, arguments.costs, latency=arguments.latency)
    title = (
        f"{parallel.schedule}: pipeline {parallel.pipeline} × virtual_stages {parallel.virtual_stages}, "
        f"{plan.num_micro_batches} micro-batches"
    )
    if arguments.out is not None:
        save(arguments.out, table, timeline, title)
    console = _console()
    _say(console, title)
    for line in draw(timeline, table, console.width):
        console.print(line, no_wrap=True, crop=False)
    console.print(summary(timeline, table))
    _show_stages(console, resolved, network)
    if arguments.out is not None:
        _say(console, str(arguments.out))
    return EXIT_OK


def _schema(arguments: argparse.Namespace) -> int:
    from trainer.recipe import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
    return EXIT_OK


def _report(arguments: argparse.Namespace) -> int:
    from trainer.track.report import write_report

    _say(_console(), str(write_report(arguments.run_dir)))
    return EXIT_OK


def _checkpoints(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.listing import prune, survey

    run = arguments.run_dir
    listing = survey(run, verify=arguments.verify)
    console = _console()
    console.print(listing.table())
    if arguments.prune is not None:
        for gone in prune(run, arguments.prune):
            _say(console, f"removed {gone.name}")
    return EXIT_DATA if listing.damaged else EXIT_OK


def _export(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.door import checkpoint_named

    checkpoint = checkpoint_named(arguments.checkpoint, option="CHECKPOINT")
    from trainer.checkpoint.export import LOGITS_TOLERANCE, compare_logits, export, require_mergeable

    if arguments.merge:
        require_mergeable(checkpoint)
    console = _console()
    exported = export(checkpoint, arguments.out, dtype=arguments.dtype, whole=arguments.merge)
    _say(
        console,
        f"{exported.folder}: {exported.tensors} tensors of step {exported.step} in {exported.dtype}, "
        f"{exported.num_bytes:,} bytes, read back and equal",
    )
    if not arguments.verify:
        return EXIT_OK
    difference = compare_logits(checkpoint, arguments.out, exported.dtype)
    _say(console, f"logits: training network and transformers differ by {difference:.1e} of the largest one")
    return EXIT_OK if difference <= LOGITS_TOLERANCE else EXIT_DIFFERS


def _generate(arguments: argparse.Namespace) -> int:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="triaxis-generate-") as folder:
        sys.stdout.write(f"{_continued(arguments, Path(folder))}\n")
    return EXIT_OK


def _continued(arguments: argparse.Namespace, scratch: Path) -> str:
    """The text, from a Hugging Face folder, or from a checkpoint by way of one in `scratch`."""
    from trainer.checkpoint.manifest import MANIFEST

    folder = arguments.folder
    if (folder / MANIFEST).is_file():
        from trainer.checkpoint.export import export

        folder = export(folder, scratch / "model", whole=True).folder
    from trainer.generate import continue_from_folder, translates

    if translates(folder):
        return _translated(arguments, folder)
    if arguments.attention is not None:
        raise RecipeError(f"--attention: the model in {folder} continues texts: give one that translates")
    return continue_from_folder(
        folder,
        arguments.prompt,
        new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )


def _translated(arguments: argparse.Namespace, folder: Path) -> str:
    from trainer.translator import Search, Translator

    translator, search = Translator(folder), Search(arguments.beams, arguments.length_penalty)
    if arguments.attention is not None:
        translator.attention(arguments.prompt, search).draw(arguments.attention)
    (found,) = translator.translate([arguments.prompt], search)
    return found


def _eval(arguments: argparse.Namespace) -> int:
    from trainer.evaluation import evaluate, table

    found = _with_harness(arguments) if arguments.harness else evaluate(_request(arguments))
    if found is None:
        return EXIT_OK
    if arguments.json:
        sys.stdout.write(json.dumps(redact(found), indent=2, ensure_ascii=False) + "\n")
    else:
        console = _console()
        for part in table(found):
            console.print(part)
    return EXIT_OK


def _with_harness(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from importlib.util import find_spec

    given = {"--target": arguments.target, "--translations": arguments.translations}
    if unread := [*arguments.files, *(flag for flag, value in given.items() if value is not None)]:
        raise RecipeError(f"--harness brings its own data: remove {unread[0]}")
    if find_spec("lm_eval") is None:
        raise RecipeError("--harness needs lm-evaluation-harness: pip install lm-eval")
    from trainer.harness import run_harness

    return run_harness(
        arguments.weights,
        arguments.set,
        tasks=arguments.harness,
        folder=arguments.harness_path,
        few_shot=arguments.few_shot,
        limit=arguments.sequences,
        chat=arguments.chat,
    )


def _request(arguments: argparse.Namespace) -> Request:
    from trainer.evaluation import Request

    given = {"--harness-path": arguments.harness_path, "--few-shot": arguments.few_shot, "--chat": arguments.chat or None}
    if unread := [flag for flag, value in given.items() if value is not None]:
        raise RecipeError(f"{unread[0]} is used only with --harness: remove it")
    files = tuple({"path": path} for path in arguments.files)
    if arguments.target is not None:
        if len(files) != 1:
            raise RecipeError(f"--target is the other side of one FILE, not of {len(files)}: give one")
        files = ({**files[0], "target_path": arguments.target},)
    return Request(arguments.weights, files, tuple(arguments.set), arguments.sequences, arguments.translations)


def _submit(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load
    from trainer.run_folder import RunFolder
    from trainer.submit import Order, hand_in, read_site, read_sweep, render, write_script

    site, sweep = read_site(arguments.site), read_sweep(arguments.sweep) if arguments.sweep else ()
    for settings in sweep or [()]:
        resolved = load(arguments.recipe, [*arguments.set, *settings])
        _check_division(resolved, arguments.nodes * arguments.ranks_per_node, "--nodes × --ranks-per-node")
    recipe = load(arguments.recipe, arguments.set).recipe
    order = Order(
        recipe=arguments.recipe.absolute(),
        run_dir=RunFolder.of(recipe, arguments.run_dir).path.absolute(),
        name=recipe.run.name,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        template=arguments.template or ("single-node" if arguments.nodes == 1 else "multi-node"),
        time=arguments.time,
        grace_s=arguments.grace,
        settings=tuple(arguments.set),
        sweep=sweep,
    )
    text = render(order, site)
    script = write_script(order, text)
    if arguments.dry_run:
        sys.stdout.write(text)
    else:
        _say(_console(), f"job {hand_in(script, site)}: {script}")
    return EXIT_OK


def _check_division(resolved: ResolvedRecipe, world_size: int, how: str) -> None:
    """RecipeError when that many ranks cannot train the recipe."""
    from trainer.batching import BatchPlan
    from trainer.deepspeed_config import deepspeed_config
    from trainer.model.config import largest_weight
    from trainer.recipe.pipeline import check_micro_batches

    plan, network = BatchPlan.from_recipe(resolved.recipe, world_size, how), _network(resolved)
    check_micro_batches(resolved.recipe, plan)
    deepspeed_config(resolved.recipe, plan, largest_weight=largest_weight(network) if network is not None else None)


def _data_prepare(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load
    from trainer.track.progress import work_progress

    recipe = load(arguments.recipe, arguments.set).recipe
    from trainer.data import prepare, prepare_summary

    with work_progress(shown=True) as progress:
        cache_dir = Path(str(recipe.data.cache_dir))
        prepared = prepare(recipe.data, seed=recipe.run.seed, cache_dir=cache_dir, build=True, progress=progress)
    for note in prepared.notes:
        _say(_console(), note)
    for row in prepare_summary(prepared):
        _say(_console(), str(row))
    return EXIT_OK


def _data_inspect(arguments: argparse.Namespace) -> int:
    """Every store below the folder, read in full; DataError (exit 65) at the first that is damaged."""
    from trainer.data.store import TokenStore

    headers = sorted(arguments.folder.rglob("header.json"))
    if not headers:
        raise RecipeError(f"{arguments.folder}: no tokenized data (header.json) there; give a folder such as runs/data")
    for header in headers:
        store = TokenStore.open(header.parent, verify="full")
        targets = f"{store.packing.targets:,} of them targets, " if store.packing else ""
        _say(
            _console(),
            f"{header.parent}: {store.num_documents:,} documents, {store.num_tokens:,} tokens, {targets}"
            f"vocabulary {store.contents.vocab_size:,}: intact",
        )
    return EXIT_OK
