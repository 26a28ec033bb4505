"""The data of a recipe as its model will see and learn it: `triaxis data inspect RECIPE`.

`sequences.py` takes sequences from training's own loader and says where each part of them comes
from; `terminal.py` and `page.py` show them; `account.py` says how many rows became how many
sequences.
"""
