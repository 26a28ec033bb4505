"""The proof that a recipe is the same training in another layout: `triaxis verify` gives it for a
user's recipe, on this machine.

`layouts.py` names layouts and puts a recipe into one, `twin.py` scales the recipe down,
`processes.py` starts the ranks, `rank.py` is the work of each of them, `compare.py` compares the
results with one process and judges, `command.py` does all of it in order.
"""
