"""Checkpoints without a layout: saved once, read in any layout, atomic, hashed. Nothing in one can
run.

| file | job |
|---|---|
| `manifest.py` | the format: logical tensors, fragments, files, and a seal over it all |
| `runs.py` | even fragments as one entry, so that a manifest does not grow with the ranks |
| `report.py` | what the ranks tell of a save, and how two reports become one |
| `geometry.py` | the elements that two fragments share |
| `tensor_file.py` | one safetensors file, written as a stream and read by ranges |
| `folder.py` | names, drafts, the rename that commits, what is kept and what is set aside |
| `check.py` | the proof that a checkpoint is, to the byte, what was written |
| `save.py` | the ranks write a checkpoint together, in the foreground or background |
| `reader.py`, `resume.py` | the newest whole checkpoint, and any range of its tensors |
| `facts.py`, `resume_check.py` | whether this run may go on from a checkpoint |
| `export.py` | a Hugging Face folder from any checkpoint, in one process |
| `checkpoints.py` | all of it for one run |
"""
