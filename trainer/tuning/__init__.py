"""Parameter-efficient tuning: what is frozen, what is put beside it, and how it leaves again.

| file | job |
|---|---|
| `methods.py` | the table of methods, without torch: names of what is trained, targets, what cannot be |
| `builders.py` | the table of methods, with torch: layers, merging, peft's keys, work between steps |
| `targets.py` | which modules the recipe's words mean in a family; no torch |
| `adapt.py` | freezes a block of the network and puts the trained parameters beside it |
| `rank_budget.py` | AdaLoRA between steps: what is important, and who keeps which rank |
| `adapter_folder.py` | an adapter as a folder, in one of two formats: |
| `peft_format.py` | … that of peft |
| `bottleneck_format.py` | … our own for bottleneck adapters, which peft lacks, and how a model of transformers gets them |
| `merge.py` | what was learned, added to the weights that it was learned for |
"""
