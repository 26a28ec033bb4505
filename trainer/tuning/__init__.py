"""Parameter-efficient tuning: what is frozen, what is put beside it, and how it leaves again.

| file | job |
|---|---|
| `targets.py` | which modules the recipe's words mean in a family; no torch |
| `adapt.py` | freezes a block of the network and puts the trained parameters beside it |
| `peft_format.py` | an adapter as a folder that peft loads |
| `merge.py` | what was learned, added to the weights that it was learned for |
"""
