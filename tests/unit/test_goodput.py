"""The ledger's arithmetic. That it explains a real run's time: end_to_end/test_resume.py."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from trainer.stopwatch import Stopwatch
from trainer.track.goodput import LEDGER, Ledger, age_of_this_process, lost_s, read_starts, shares_of


def start(began: float, until: float, lost: float = 0.0, **seconds: float) -> dict[str, object]:
    return {"began": began, "until": until, "from_step": 0, "to_step": 1, "seconds": seconds, "lost_s": lost}


def test_shares_of_two_starts() -> None:
    shares = shares_of(
        [
            start(0, 100, lost=20, init=10, data=5, compute=60, communication=15, save=10),
            start(500, 600, init=10, compute=70, communication=10, evaluation=6, other=4),
        ]
    )
    assert shares["allocated_s"] == 200, "the queue between two starts is nobody's time"
    assert shares["goodput"] == pytest.approx((80 + 80 - 20) / 200)
    assert shares["lost"] == pytest.approx(0.1)
    assert shares["explained"] == pytest.approx(196 / 200)
    kinds = ("init", "data", "compute", "communication", "save", "evaluation", "guard", "export", "other", "lost")
    assert sum(shares[kind] for kind in kinds) == pytest.approx(1.0), "each second once"
    assert shares_of([]) == {}


def test_what_a_resumed_run_makes_again() -> None:
    times = {1: 10.0, 2: 12.0, 3: 14.0, 4: 16.0}
    assert lost_s(times, 2) == 4.0
    assert lost_s(times, 4) == 0.0
    assert lost_s({}, 0) == 0.0


def test_waiting_is_taken_out_of_compute(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, from_step=0, times={})
    seconds = ledger.of_now(3, {"forward": 4.0, "backward": 6.0, "data": 1.0, "boundary": 0.5}, {"backward": 0.5})["seconds"]
    assert (seconds["compute"], seconds["communication"], seconds["data"], seconds["other"]) == (7.0, 3.0, 1.0, 0.5)
    # What is not among them was before the stopwatch: imports are paid for too.
    assert seconds["init"] == pytest.approx(max(0.0, age_of_this_process() - 11.5), abs=5.0)


def test_what_was_before_the_ledger_is_counted_once(tmp_path: Path) -> None:
    """Data is read, and timed, before the run folder's ledger is opened."""
    watch = Stopwatch(torch.device("cpu"))
    watch.begin("reading the data")
    time.sleep(0.2)
    ledger = Ledger(tmp_path, from_step=0, times={})
    with watch("forward"):
        time.sleep(0.1)
    shares = ledger.shares(1, watch.totals(), {})
    kinds = ("init", "data", "compute", "communication", "save", "evaluation", "guard", "export", "other", "lost")
    # The process's age is known to a hundredth of a second, its start's clock tick.
    assert sum(shares[kind] for kind in kinds) * shares["allocated_s"] == pytest.approx(shares["allocated_s"], abs=0.05)


def test_earlier_starts_are_kept_and_what_is_made_again_is_lost(tmp_path: Path) -> None:
    first = Ledger(tmp_path, from_step=0, times={})
    first.write(5, {"forward": 3.0}, {})
    first.write(6, {"forward": 4.0}, {})  # too soon after the last: a step must not wait for the disk
    (told,) = read_starts(tmp_path)
    assert (told["to_step"], told["seconds"]["compute"]) == (5, 3.0)
    end = told["until"]
    second = Ledger(tmp_path, from_step=4, times={4: end, 5: end + 1.0, 8: end + 6.0})  # steps 5 to 8 were killed
    second.write(9, {"forward": 2.0}, {}, always=True)
    before, now = read_starts(tmp_path)
    assert (before["until"], before["seconds"]["compute"], before["lost_s"]) == (end + 6.0, 9.0, 6.0)
    assert (now["from_step"], now["to_step"], now["lost_s"]) == (4, 9, 0.0)
    assert (tmp_path / LEDGER).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"starts": [{}]}', '{"starts": 3}', '{"starts": [{"began": "x"}]}'])
def test_a_ledger_that_cannot_be_read_is_begun_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text(text)
    Ledger(tmp_path, from_step=0, times={3: 4.0}).write(1, {}, {}, always=True)
    assert len(json.loads((tmp_path / LEDGER).read_text())["starts"]) == 1


def test_every_second_is_counted_once() -> None:
    began = time.monotonic()
    watch = Stopwatch(torch.device("cpu"))
    watch.begin("reading the data")
    time.sleep(0.03)
    with watch("evaluation"):
        time.sleep(0.02)
        with watch("forward"):
            time.sleep(0.05)
        time.sleep(0.02)
    watch.begin_step(1)
    with suppress(ValueError), watch("data"):
        time.sleep(0.01)
        raise ValueError
    totals, spent = watch.totals(), time.monotonic() - began
    assert sum(totals.values()) == pytest.approx(spent, abs=0.01)
    assert totals["forward"] >= 0.05
    assert totals["evaluation"] >= 0.04
    assert totals["evaluation"] < spent - totals["forward"] - 0.02, "not what is inside of it"
    assert totals["data"] >= 0.01, "an error ends a part too"
