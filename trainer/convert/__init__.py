"""The keys of other tools, and what they are in a recipe: of DeepSpeed, transformers' Trainer and
TRL's, LLaMA-Factory and axolotl.

A file of this folder has one tool's table: a row for each of its keys, with the key of a recipe
that it becomes, or the reason why it becomes none. `triaxis convert` fills a draft by the rows, and
"did you mean" looks its words up in the same ones (`words.py`). No torch.
"""
