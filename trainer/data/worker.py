"""A tokenizing process: `python -m trainer.data.worker TOKENIZER SHARDS TASK SETTINGS`, started by
workers.py.

SETTINGS, in JSON, are those of the task's writer of texts or examples. The process reads one task
per line, {"number", "shard"}, and answers each with one line: {"number"} when the shard is durable,
or {"failed": lines, "exit_code"}. It ends at once when its input does, because then the process
that started it has ended too.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path

from trainer.data.native import TokenizerFails
from trainer.data.readers import Shard
from trainer.data.shards import shard_folder, tokenize_shard
from trainer.data.tasks import ROW_TASKS, written_again
from trainer.data.tokenizer_loading import reopen_tokenizer
from trainer.errors import DataError, RecipeError, UserError
from trainer.redaction import redact_text


def main() -> None:
    _keep_stderr_from_native_code()
    tokenizer_folder, shards, task_name, settings = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5]
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    tokenizer = reopen_tokenizer(tokenizer_folder)
    written = written_again(task_name, tokenizer, json.loads(settings))
    format = ROW_TASKS[task_name].format if task_name in ROW_TASKS else None
    while True:
        task = json.loads(tasks.get())
        try:
            shard = Shard.from_json(task["shard"], format)
            tokenize_shard(shard, tokenizer, shard_folder(shards, task["number"]), written)
            reply = {"number": task["number"]}
        except TokenizerFails as error:
            files = ", ".join(file.name for file in shard.files) or shard.path
            reply = {"failed": [f"{shard.where} ({files}): {line}" for line in error.lines], "exit_code": error.exit_code}
        except UserError as error:
            reply = {"failed": error.lines, "exit_code": error.exit_code}
        except OSError as error:
            # Errors in reading have other types by now, so this one is about writing.
            line = f"{shards}: {error.strerror or error}; make room there, or set data.cache_dir"
            reply = {"failed": [line], "exit_code": DataError.exit_code}
        except MemoryError:
            line = "data: a tokenizing process has no memory left; lower data.workers and start again: finished shards are kept"
            reply = {"failed": [line], "exit_code": RecipeError.exit_code}
        except Exception as error:  # a bug of ours must not look like a killed worker
            sys.stderr.write(redact_text(traceback.format_exc()))
            line = (
                f"data: a tokenizing process failed: {type(error).__name__}: {error}; its traceback is above: please report it"
            )
            reply = {"failed": [redact_text(line)], "exit_code": UserError.exit_code}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _keep_stderr_from_native_code() -> None:
    """Keep stderr for Python and drop what native code writes there: Rust reports each panic, which
    the reply reports already."""
    sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")  # noqa: SIM115 - to the end of the process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _listen(tasks: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        tasks.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
