"""The way from sources to documents, tokens, packed samples and micro-batches.

Start reading at `prepared.py`. Nothing here imports torch except `loader.py`, so that tokenizing
processes stay small.
"""

from trainer.data.baseline import unigram_perplexity
from trainer.data.prepared import PreparedData, SourceRow, prepare, prepare_summary, was_prepared

__all__ = ["PreparedData", "SourceRow", "prepare", "prepare_summary", "unigram_perplexity", "was_prepared"]
