"""Parameter-efficient tuning: frozen weights, the parameters trained beside them, and their export.

| file | job |
|---|---|
| `methods.py` | the table of methods, without torch: names of what is trained, targets, what cannot be |
| `builders.py` | the table of methods, with torch: layers, merging, peft's keys, work between steps |
| `targets.py` | which modules the recipe's words mean in a family; no torch |
| `adapt.py` | freezes a block of the network and adds the trained parameters |
| `rank_budget.py` | AdaLoRA between steps: the importance of each rank, and the choice of those that stay |
| `adapter_folder.py` | an adapter as a folder, in one of two formats: |
| `peft_format.py` | … that of peft |
| `bottleneck_format.py` | … our own for bottleneck adapters, which peft lacks, with a loader for transformers |
| `merge.py` | adapters merged into the weights that they were trained for |
"""
