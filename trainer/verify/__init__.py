"""Is a recipe the same training in another layout? `triaxis verify` answers for a user's own recipe, on this machine.

`layouts.py` names layouts and puts a recipe into one, `twin.py` scales the recipe down, `processes.py` starts the ranks,
`rank.py` is what each of them does, `compare.py` holds the results against one process and judges, `command.py` does all of
it in order.
"""
