"""The log file of each rank, `logs/rank-00000.log`: ours, DeepSpeed's, everybody's. The console is
left to the run's own lines."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from trainer.files.reading import open_to_append
from trainer.files.spare import Spare


class RankLog:
    """A log file that takes the records of this process until `close`."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._handler = _SpareHandler(path)
        self._handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
        self._root_level = logging.root.level
        self._taken: list[tuple[logging.Logger, bool, list[logging.Handler]]] = []
        logging.root.addHandler(self._handler)
        logging.root.setLevel(min(logging.INFO, self._root_level))
        logging.captureWarnings(True)
        self.capture()

    def capture(self) -> None:
        """Redirect the loggers that write to the terminal into the file. Call again after importing
        a library that makes one.

        DeepSpeed and transformers give their logger a terminal handler of its own and stop it from
        propagating.
        """
        loggers = [
            logging.root,
            *(item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)),
        ]
        for logger in loggers:
            terminal = [handler for handler in logger.handlers if _writes_to_terminal(handler)]
            if not terminal:
                continue
            self._taken.append((logger, logger.propagate, terminal))
            for handler in terminal:
                logger.removeHandler(handler)
            logger.propagate = True

    def close(self) -> None:
        """Close the file and restore the loggers."""
        for logger, propagate, handlers in reversed(self._taken):
            for handler in handlers:
                logger.addHandler(handler)
            logger.propagate = propagate
        self._taken.clear()
        logging.captureWarnings(False)
        logging.root.setLevel(self._root_level)
        logging.root.removeHandler(self._handler)
        self._handler.close()

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _SpareHandler(logging.StreamHandler[TextIO]):
    """A handler that appends to the file. All records that a full disk does not take cost one line
    together, where logging would write a traceback for each."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.TextIOWrapper(io.BufferedWriter(open_to_append(path)), encoding="utf-8"))
        self._spare = Spare(path, "records are missing there")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._spare.failed(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Close the file, with what could not be written."""
        super().close()
        with self._spare.written():
            self.stream.close()


def open_rank_log(folder: Path, rank: int) -> RankLog:
    """Send every logger of this process to `folder/logs/rank-<rank>.log`. It appends, so a requeued
    run keeps its past."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return RankLog(logs / f"rank-{rank:05d}.log", rank)


def _writes_to_terminal(handler: logging.Handler) -> bool:
    if not isinstance(handler, logging.StreamHandler):
        return False
    return handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
