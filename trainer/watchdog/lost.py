"""The errors by which a lost peer shows itself inside a collective."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.errors import EXIT_HANG, EXIT_REQUEUE, UserError
from trainer.exhausted import exhausted
from trainer.watchdog.watchdog import PeerLost, Watchdog

# The messages of gloo and NCCL; torch raises both as RuntimeError.
GONE = re.compile(
    r"connection (closed|reset) by peer|connection was likely closed|broken pipe|remote process exited|connection refused",
    re.IGNORECASE,
)
SILENT = re.compile(r"timed out|timeout", re.IGNORECASE)


@contextmanager
def among_ranks(watchdog: Watchdog, doing: Callable[[], str]) -> Iterator[None]:
    """Translate errors in work that needs the other ranks.

    Raises PeerLost, naming those that are missing, when one dies or nobody makes progress, and
    PeerFailed on the ranks that need not report it too. `doing` says what this rank was at, such as
    "backward of step 12".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if outcome := watchdog.outcome:  # the watchdog woke this rank
            raise outcome from error
        if said := exhausted(error, f"rank {watchdog.rank}: {doing()}"):
            raise said from error
        if not (reason := _lost_peer(error)):
            raise
        if GONE.search(reason):
            raise watchdog.peer_lost(EXIT_REQUEUE, f"a connection broke in {doing()}", error) from error
        raise watchdog.peer_lost(EXIT_HANG, f"no answer in {doing()}", error) from error


@contextmanager
def among_strangers(rank: int) -> Iterator[None]:
    """Translate errors in work at the beginning, while no watchdog knows who is missing: each rank
    that notices a lost peer says so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if said := exhausted(error, f"rank {rank}: the set-up"):
            raise said from error
        if not (reason := _lost_peer(error)):
            raise
        gone = GONE.search(reason)
        noticed = "a connection broke" if gone else "no answer"
        line = f"rank {rank}: another rank has ended, or never began ({noticed} before the run was set up); start the run again"
        raise PeerLost(EXIT_REQUEUE if gone else EXIT_HANG, line) from error


def _lost_peer(error: BaseException | None) -> str:
    """Return the message of a lost peer in an error, or in those it was raised from; "" if there is
    none."""
    while error is not None:
        text = str(error)
        if isinstance(error, RuntimeError) and (GONE.search(text) or SILENT.search(text)):
            return text
        error = error.__cause__ or error.__context__
    return ""
