"""Checkpoints without a layout: saved once, read in any, atomic, hashed; nothing in one can run.

| file | job |
|---|---|
| `manifest.py` | the format: logical tensors, fragments, files, and a seal over it all |
| `geometry.py` | which elements two fragments share |
| `tensor_file.py` | one safetensors file, written as a stream and read by ranges |
| `folder.py` | names, drafts, the rename that commits, what is kept and what is set aside |
| `check.py` | is it, to the byte, what was written? |
| `save.py` | the ranks write a checkpoint together, in the foreground or behind |
| `reader.py`, `resume.py` | the newest whole one, and any range of its tensors |
| `facts.py`, `resume_check.py` | may this run go on from it? |
| `export.py` | a Hugging Face folder from any of them, in one process |
| `checkpoints.py` | all of it for one run |
"""
