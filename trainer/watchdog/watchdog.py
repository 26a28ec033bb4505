"""The watchdog: threads in each rank that watch a run, and end it on all ranks when it makes no
progress.

    every half second: own beat ─► store; rank 0 reads all beats (so do the next ranks, once they
    stand still themselves)
    a hang, or a rank that noticed a lost peer ─► one verdict in the store
    ─► each rank: stack, collectives ─► store ─► the rank that gave the verdict writes the page
    ─► all ranks end: waiting ones are woken, those that cannot wake are killed

The store lives in the process of rank 0, in a thread that needs no interpreter. When rank 0 is
stopped the store is silent, and so each rank knows who is missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from trainer.errors import EXIT_HANG, EXIT_REQUEUE, UserError
from trainer.files.durable import private_file
from trainer.launch.processes import Process
from trainer.launch.ranks import Neighbour, PeerFailed
from trainer.redaction import redact_text
from trainer.stopwatch import Stopwatch
from trainer.watchdog.autopsy import Report, Scene, find, page
from trainer.watchdog.beats import DONE, SILENT_S, Beat, Limits, Roll
from trainer.watchdog.flight_recorder import collectives
from trainer.watchdog.slow import SlowRanks
from trainer.watchdog.stacks import (
    LastResort,
    innermost_of_ours,
    is_waiting,
    stack_of,
    stack_of_error,
    written_stack,
)

logger = logging.getLogger(__name__)

BEAT_S = 0.5
SAMPLES_PER_BEAT = 5  # samples of the training's position, 20 µs each
JUDGES = 4  # the first ranks; if the node of all of them is gone, so is the store
STORE_S = 5.0  # the longest that the store may take for one exchange
REPORTS_S = 2.0  # the longest wait for the reports of ranks that still beat
WAKING_S = 1.5  # the longest wait for the training to wake
LEAVING_S = 10.0  # the longest wait until it has then released its resources


class PeerLost(UserError):
    """The error that another rank died or does not answer."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Verdict:
    """The decision to end a run.

    `by`: the rank that gave it, collects the reports and writes the page. `exit_code`: the exit
    code of all ranks. `noticed`: what gave it away.
    """

    by: int
    exit_code: int
    noticed: str


def _own_connection(neighbour: Neighbour | None) -> Store:
    """Open another connection to the store of the default group.

    torch tries for as long as a collective may take, and cannot be woken. PeerLost as soon as the
    neighbour has ended, because that is how a store disappears.
    """
    answers: SimpleQueue[Store | RuntimeError] = SimpleQueue()

    def connect() -> None:
        try:
            answers.put(dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=connect, name="connecting the watchdog", daemon=True).start()
    while True:
        with contextlib.suppress(Empty):
            answer = answers.get(timeout=BEAT_S / SAMPLES_PER_BEAT)
            break
        if neighbour is not None and not neighbour.process.state:
            raise PeerLost(EXIT_REQUEUE, f"rank {neighbour.rank} has ended before the run was set up; start the run again")
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


class Watchdog:
    """The watchdog of one rank, active inside its context.

    `watch` tells what the rank is at. `logs`: the folder of pages and stacks. `peers`: groups of
    ranks that do the same work.
    """

    def __init__(
        self,
        watch: Stopwatch,
        limits: Limits,
        logs: Path,
        run_name: str,
        peers: Sequence[Sequence[int]],
        *,
        neighbour: Neighbour | None = None,
    ) -> None:
        """Connect to the store and prepare the threads. `neighbour`: the rank that this one looks
        after."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._watch, self._limits, self._logs, self._run_name = watch, limits, logs, run_name
        self._main, self._neighbour = threading.get_ident(), neighbour
        self._process = Process.own()
        self._count = 0
        self._sampled: Counter[str] = Counter()
        self._waited: Counter[str] = Counter()
        self._worked_s: dict[str, float] = defaultdict(float)
        self._sampled_at = time.monotonic()
        self._slow = SlowRanks(peers)
        self._remarks: SimpleQueue[str] = SimpleQueue()
        self._answer_s = 0.0
        self._roll = Roll(limits)
        self._store = _own_connection(neighbour)
        self._answered = time.monotonic()  # the time of the store's last answer
        self._over, self._awake = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # the training and both threads may want to end the run
        self._outcome: UserError | None = None
        self._failed_at: list[str] = []  # the training's stack when it noticed a lost peer
        self._last_resort = LastResort(self._stack_file(self.rank))
        self._threads = [
            threading.Thread(target=self._beat_on, name="watchdog", daemon=True),
            threading.Thread(target=self._mind_the_store, name="watchdog of the store", daemon=True),
        ]

    def __enter__(self) -> Watchdog:
        self._say()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Report once more how this rank ended: others may still be at work, or wait for it."""
        self._over.set()
        self._threads[0].join(STORE_S)
        if not self._threads[0].is_alive() and self._outcome is None:
            with contextlib.suppress(RuntimeError, OSError):
                self._say(ended=DONE if kind is None else f"{kind.__name__}: {error}")
        self._last_resort.close()

    # ----------------------------------------------------------------------------------- every beat

    def _beat_on(self) -> None:
        try:
            while not self._over.wait(BEAT_S / SAMPLES_PER_BEAT):
                self._sample()
                if self._sampled.total() % SAMPLES_PER_BEAT == 0:
                    self._exchange()
        except (RuntimeError, OSError) as error:
            # The store ended with rank 0; the training will notice.
            logger.info("the watchdog's store is gone: %s", error)

    def _sample(self) -> None:
        phase, waits, now = self._watch.phase, is_waiting(stack_of(self._main)), time.monotonic()
        self._sampled[phase] += 1
        self._waited[phase] += waits
        if not waits:
            self._worked_s[phase] += now - self._sampled_at
        self._sampled_at = now

    def waiting(self) -> dict[str, float]:
        """Return, for each phase, the share of its time in which this rank was seen waiting for
        others."""
        return {phase: self._waited[phase] / count for phase, count in self._sampled.copy().items()}

    def _exchange(self) -> None:
        self._last_resort.put_off()
        beat, asked = self._say(), time.monotonic()
        is_over = self._store.check([self._key("verdict")])
        self._answered = time.monotonic()
        self._answer_s = self._answered - asked
        if is_over:
            self._end(self._told())
        elif self.rank == 0 or (self.rank < JUDGES and beat.idle_s > beat.limit_s / 2):
            self._judge()
        else:
            # Remember what rank 0, which holds the store, is at before the store goes silent.
            self._hear([0])

    def _say(self, ended: str = "") -> Beat:
        beat = replace(self._beat(), ended=ended)
        self._store.set(self._key("beat", self.rank), beat.encode())
        return beat

    def _beat(self) -> Beat:
        self._count += 1
        watch = self._watch
        return Beat(
            rank=self.rank,
            **vars(self._process),
            count=self._count,
            step=watch.step,
            phase=watch.phase,
            doing=innermost_of_ours(self._stack()),
            idle_s=self._idle_s,
            limit_s=self._limit_s,
            data_s=self._worked_s["data"],
            compute_s=sum(self._worked_s[phase] for phase in ("forward", "backward", "optimizer")),
            answer_s=self._answer_s,
        )

    def _stack(self) -> list[str]:
        return self._failed_at or stack_of(self._main)

    def _hear(self, ranks: Sequence[int]) -> bool:
        """Read the last beats of these ranks; False while one of them has sent none."""
        keys = [self._key("beat", rank) for rank in ranks]
        if not self._store.check(keys):
            return False
        self._roll.hear(map(Beat.decode, self._store.multi_get(keys)), time.monotonic())
        return True

    def _judge(self) -> None:
        if not self._hear(range(self.size)):
            return
        now = time.monotonic()
        if self._roll.hang(now):
            self._end(self._verdict(EXIT_HANG, f"no rank got on for {self._roll.longest_s(now):.0f} s"))
        for line in self._slow.hear(self._roll.beats.values(), now):
            self._remarks.put(line)

    def remarks(self) -> Iterator[str]:
        """Yield lines about slow ranks, on the first rank, each once."""
        while not self._remarks.empty():
            yield self._remarks.get()

    def _mind_the_store(self) -> None:
        """End the run when the store does not answer, which blocks the other thread for ever, or
        the neighbour's process is gone.

        This thread talks to the store only when a process is gone.
        """
        while not self._over.wait(BEAT_S):
            if self._neighbour_is_gone():
                self._end(self._verdict(EXIT_REQUEUE, "its process has ended"))
                return
            overdue = self.rank > 0 and time.monotonic() - self._answered > STORE_S
            if overdue and self._idle_s >= self._limit_s:
                self._end(self._without_store(EXIT_HANG, f"no answer for {self._idle_s:.0f} s"))
                return

    def _neighbour_is_gone(self) -> bool:
        """Return whether the neighbour's process ended before the run did.

        A rank that waits for it in a collective notices at once, but one that waits for a file, or
        for a group to be made, would wait for hours.
        """
        neighbour = self._neighbour
        if neighbour is None or neighbour.process.state:
            return False
        with contextlib.suppress(RuntimeError, OSError):
            self._hear([neighbour.rank])
        # The store ends with rank 0; at the end of a run perhaps before others know that it is
        # done.
        return not self._roll.has_ended(neighbour.rank) and not (neighbour.rank == 0 and self._watch.phase == "export")

    @property
    def _idle_s(self) -> float:
        return time.monotonic() - self._watch.changed

    @property
    def _limit_s(self) -> float:
        return self._limits.of(self._watch.phase, settled=self._watch.settled)

    # -------------------------------------------------------------------------------------- the end

    def peer_lost(self, exit_code: int, noticed: str, error: BaseException) -> UserError:
        """Return the error with which this rank ends, as all others do, after a collective failed
        in the training with `error`."""
        self._awake.set()
        self._failed_at = stack_of_error(error)
        return self._verdict(exit_code, noticed)

    @property
    def outcome(self) -> UserError | None:
        """The error with which this rank ends, once the run is over; None before."""
        if self._outcome is not None:
            self._awake.set()
        return self._outcome

    def _verdict(self, exit_code: int, noticed: str) -> UserError:
        """Give a verdict. The first one counts, and from here on all ranks go the same way."""
        mine = json.dumps(asdict(Verdict(self.rank, exit_code, noticed)))
        try:
            self._store.compare_set(self._key("verdict"), "", mine)
        except (RuntimeError, OSError):
            return self._without_store(exit_code, noticed)
        return self._told()

    def _told(self) -> UserError:
        with self._lock:
            if self._outcome is None:
                verdict = Verdict(**json.loads(self._store.get(self._key("verdict"))))
                try:
                    self._outcome = self._examine(verdict)
                except (RuntimeError, OSError) as error:
                    logger.info("the watchdog's store is gone: %s", error)
                    self._outcome = self._alone(verdict.exit_code, verdict.noticed)
        return self._outcome

    def _without_store(self, exit_code: int, noticed: str) -> UserError:
        with self._lock:
            if self._outcome is None:
                self._outcome = self._alone(exit_code, noticed)
        return self._outcome

    def _examine(self, verdict: Verdict) -> UserError:
        """Report what this rank is at. The rank that gave the verdict collects the reports and
        writes the page; the others wait for it."""
        silent = self._silent_ranks()
        self._store.set(self._key("report", self.rank), json.dumps(self._report(silent).as_json()))
        if verdict.by != self.rank:
            self._wait_for([self._key("page")], REPORTS_S + SILENT_S)
            self._store.set(self._key("read", self.rank), "1")
            self._keep_the_store(set(silent))
            self._kill(silent)
            return PeerFailed(verdict.exit_code)
        scene = self._scene(silent)
        line = self._publish(scene, verdict.noticed, everywhere=True)
        self._store.set(self._key("page"), line)
        self._store.set(self._key("read", self.rank), "1")
        self._keep_the_store(set(scene.silent))
        self._kill(scene.silent)
        return PeerLost(verdict.exit_code, line)

    def _keep_the_store(self, silent: set[int]) -> None:
        """Wait, on the rank that holds the store, until the others know how they end."""
        if self.rank == 0:
            self._wait_for([self._key("read", rank) for rank in range(self.size) if rank not in silent], REPORTS_S)

    def _alone(self, exit_code: int, noticed: str) -> UserError:
        """Judge without the store, because rank 0 does not answer. Each rank knows the same, and
        the next one writes the page."""
        beat = self._roll.beats.get(0)
        silent = {0: beat} if beat else {}
        scene = Scene({self.rank: self._report(silent)}, silent, {}, {})
        line = self._publish(scene, noticed, everywhere=self.rank == 1)
        self._kill(silent)
        return PeerLost(exit_code, line)

    def _silent_ranks(self) -> dict[int, Beat]:
        """Return the last beats of silent ranks, after listening until a silent rank is told from a
        slow one, or its host knows better."""
        began = time.monotonic()
        while True:
            self._say()
            self._hear([rank for rank in range(self.size) if self._store.check([self._key("beat", rank)])])
            now, beats = time.monotonic(), self._roll.beats
            gone = {rank for rank, beat in beats.items() if not beat.ended and self._has_ended(beat)}
            silent = gone | set(self._roll.silent(now))
            heard = [rank for rank in beats if self._roll.heard[rank] > began or beats[rank].ended]
            if len(silent.union(heard)) >= self.size or now - began > SILENT_S + BEAT_S:
                return {rank: beats[rank] for rank in sorted(silent)}
            time.sleep(BEAT_S / 5)

    def _has_ended(self, beat: Beat) -> bool:
        return beat.process.is_beside(self._process) and not beat.process.state

    def _report(self, silent: dict[int, Beat]) -> Report:
        states = {rank: beat.process.state for rank, beat in silent.items() if beat.process.is_beside(self._process)}
        return Report(self._beat(), tuple(self._stack()), tuple(collectives()), states)

    def _scene(self, silent: dict[int, Beat]) -> Scene:
        others = [rank for rank in range(self.size) if rank not in silent and not self._roll.has_ended(rank)]
        self._wait_for([self._key("report", rank) for rank in others], REPORTS_S)
        there = [rank for rank in others if self._store.check([self._key("report", rank)])]
        texts = self._store.multi_get([self._key("report", rank) for rank in there]) if there else []
        reports = {rank: Report.from_json(json.loads(text)) for rank, text in zip(there, texts, strict=True)}
        missing = {rank: beat for rank, beat in self._roll.beats.items() if rank not in reports}
        now = time.monotonic()
        return Scene(
            reports,
            missing,
            {rank: written_stack(self._stack_file(rank)) for rank in missing},
            {rank: self._roll.idle_s(rank, now) for rank in self._roll.beats},
        )

    def _wait_for(self, keys: list[str], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not self._store.check(keys) and time.monotonic() < deadline:
            self._say()
            time.sleep(BEAT_S / 5)

    def _publish(self, scene: Scene, noticed: str, *, everywhere: bool) -> str:
        """Write the page to the terminal and to a file beside the ranks' logs, or to this rank's
        log, and return its line.

        A full disk must not keep the run from ending.
        """
        finding, now = find(scene), datetime.now(UTC)
        path = self._logs / f"autopsy-{now:%Y%m%dT%H%M%S}.txt"
        who = f"rank {', '.join(map(str, finding.ranks))} {finding.what}" if finding.ranks else finding.what
        line = redact_text(f"rank {self.rank}: {who} ({noticed}; this rank was in {self._watch.doing}); start the run again")
        ranks = f"{self.size} rank{'s' if self.size > 1 else ''}"
        title = f"Autopsy of run {self._run_name}, {ranks}, {now:%Y-%m-%d %H:%M:%S} UTC"
        text = redact_text(page(title, line, scene, finding))
        if not everywhere:
            logger.error("%s", text)
            return line
        sys.stderr.write(f"\n{text}\n")
        sys.stderr.flush()
        with contextlib.suppress(OSError), private_file(path) as file:
            file.write(f"{text}\n".encode())
        return f"{line}; what each rank did: {path}"

    def _kill(self, silent: Mapping[int, Beat]) -> None:
        """Kill silent processes on this host: one that is stopped, or whose interpreter does not
        run, cannot end itself."""
        for beat in silent.values():
            process = beat.process
            if process.is_beside(self._process) and process.pid != self._process.pid and process.state:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _end(self, outcome: UserError) -> None:
        """End the training from a thread beside it: wake it, or end without it. What a run leaves
        on disk is whole at any time."""
        for group in list(dist.distributed_c10d._world.pg_names):
            with contextlib.suppress(RuntimeError):
                group.abort()
        if self._awake.wait(WAKING_S) and not self._over.wait(LEAVING_S):
            logger.error("the training does not end")
        if not self._over.is_set():
            for line in outcome.lines:
                sys.stderr.write(f"triaxis: error: {line}\n")
            sys.stderr.flush()
            logging.shutdown()
            os._exit(outcome.exit_code)

    def _key(self, kind: str, rank: int | None = None) -> str:
        return f"triaxis/watchdog/{kind}" if rank is None else f"triaxis/watchdog/{kind}/{rank}"

    def _stack_file(self, rank: int) -> Path:
        return self._logs / f"rank-{rank:05d}.stack"
