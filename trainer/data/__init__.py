"""Sources → documents → tokens → packed samples → micro-batches.

Start at `prepared.py`. Nothing here imports torch but `loader.py`, so that tokenizing processes stay small.
"""

from trainer.data.baseline import unigram_perplexity
from trainer.data.prepared import PreparedData, SourceRow, prepare, prepare_summary, was_prepared

__all__ = ["PreparedData", "SourceRow", "prepare", "prepare_summary", "unigram_perplexity", "was_prepared"]
