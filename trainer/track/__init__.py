"""The reports of a run: its history on disk, its mirrors (W&B, TensorBoard), its console, its
report page.

    tracker = make_tracker(recipe.tracking, run, writing_rank=place.is_first)     # started
    tracker.log({"step": 1, "loss": 5.1, …})
    tracker.evaluate({"step": 1, "eval_loss": 5.0, …})
    tracker.note("weights written to …")
    tracker.finish({"final_loss": 5.1, …})

The history (`jsonl.py`) is ours and is the truth. Everything else may fail without the run
noticing.
"""

from trainer.track.jsonl import read_metrics, truncate_after
from trainer.track.log import open_rank_log
from trainer.track.run_info import RunInfo
from trainer.track.tracker import CompositeTracker, NullTracker, Tracker, make_tracker

__all__ = [
    "CompositeTracker",
    "NullTracker",
    "RunInfo",
    "Tracker",
    "make_tracker",
    "open_rank_log",
    "read_metrics",
    "truncate_after",
]
