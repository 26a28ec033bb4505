"""The training program, and what another program may call of it.

| call | what comes back |
|---|---|
| `trainer.cli.main(["train", "recipe.json"])` | the exit code of any command, run here; its errors are lines on stderr |
| `trainer.recipe.load("recipe.json", ["train.steps=10"])` | a checked recipe; `.recipe` has the keys |
| `trainer.track.read_metrics("runs/my-first/metrics.jsonl")` | a run's history, a dict for each logged step |
| `trainer.checkpoint.export.export(checkpoint, out)` | a new Hugging Face folder, and what was written |
| `trainer.tuning.bottleneck_format.load_bottlenecks(model, folder)` | a model of transformers with our bottleneck adapters |

All but `main` raise `trainer.errors.UserError`, whose `lines` say what to change. Exported models
and other adapters are loaded by transformers and peft themselves. `import trainer` imports nothing;
of these calls only the last two import torch, and `main` does if its command needs it. Everything
else may change with any version. `tools/first_hour.ipynb` shows them at work.
"""
