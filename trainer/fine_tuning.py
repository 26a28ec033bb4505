"""The rates that published recipes fine-tune with: a row for each task, loss of preferences and
method of tuning. No torch.

They are the defaults where `model.from_pretrained` is given (`recipe/task_defaults.py`). Every row
has its source; what a source leaves out has the default of the program that it runs. A new task,
loss or method needs a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from trainer.tasks import TASKS, TaskName

# The compute format of a model that is gone on from, where the recipe names none. bf16 has the
# exponents of fp32, so it needs no loss scale (Kalamkar et al. 2019, arXiv:1905.12322), and GPUs
# multiply in it from capability 8.0 on. Older ones have only fp16, which overflows with weights
# that were trained in bf16: whoever wants it writes it.
LEAST_CAPABILITY = (8, 0)
BY_DEVICE = "bf16 on a CUDA device of capability 8.0 or newer, fp32 elsewhere"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates of a published run with AdamW.

    | field | meaning |
    |---|---|
    | `lr` | the peak of the learning rate |
    | `warmup` | the share of the steps in which it rises |
    | `schedule` | the shape after the warm-up; all but constant end at 0 |
    | `weight_decay` | the decay of weight matrices |
    | `source` | where that was published |
    | `tuned` | of a task: its part of a method's own `lr`, where a few weights are tuned |
    """

    lr: float
    warmup: float
    schedule: Literal["constant", "linear", "cosine"]
    weight_decay: float
    source: str
    tuned: float = 1.0


OF_TASKS: Mapping[TaskName, Rates] = {
    "pretrain": Rates(
        lr=5e-5,
        warmup=0.0,
        schedule="linear",
        weight_decay=0.0,
        source="transformers' run_clm.py, the defaults of TrainingArguments",
    ),
    "sft": Rates(
        lr=2e-5,
        warmup=0.1,
        schedule="cosine",
        weight_decay=0.0,
        source="alignment-handbook, zephyr-7b-beta/sft/config_full.yaml",
    ),
    # 2,500 of 40,000 steps of warm-up
    "translate": Rates(
        lr=3e-5,
        warmup=0.0625,
        schedule="linear",
        weight_decay=0.0,
        source="mBART, Liu et al. 2020, arXiv:2001.08210, fairseq's examples/mbart",
    ),
    "mlm": Rates(
        lr=1e-4,
        warmup=0.0,
        schedule="linear",
        weight_decay=0.0,
        source="TAPT, Gururangan et al. 2020, arXiv:2004.10964, allenai/dont-stop-pretraining",
    ),
    "classify": Rates(
        lr=2e-5,
        warmup=0.1,
        schedule="linear",
        weight_decay=0.01,
        source="Mosbach et al. 2021, arXiv:2006.04884, uds-lsv/bert-stable-fine-tuning",
    ),
}
_DPO = Rates(
    lr=5e-7,
    warmup=0.1,
    schedule="cosine",
    weight_decay=0.0,
    source="Zephyr, Tunstall et al. 2023, arXiv:2310.16944, alignment-handbook, zephyr-7b-beta/dpo: "
    "config_full.yaml, and config_qlora.yaml with 5e-6 beside 2e-4 for sft",
    tuned=1 / 40,
)
# The tasks that compare answers. IPO's paper has no language model; trl trains it as DPO. ORPO's
# recipes warm up for 100 steps and then fall with the root of the step, whatever the length of the
# run; here it has DPO's shape.
OF_LOSSES: Mapping[str, Rates] = {
    "dpo": _DPO,
    "ipo": _DPO,
    "orpo": replace(
        _DPO,
        lr=5e-6,
        tuned=1 / 4,
        source="alignment-handbook, zephyr-141b-A35b/orpo: config_full.yaml, and config_qlora.yaml with 5e-5",
    ),
}
_LORA = Rates(
    lr=2e-4,
    warmup=0.1,
    schedule="cosine",
    weight_decay=0.0,
    source="QLoRA, Dettmers et al. 2023, arXiv:2305.14314; alignment-handbook, zephyr-7b-beta/sft/config_qlora.yaml",
)
OF_METHODS: Mapping[str, Rates] = {
    "lora": _LORA,
    "dora": replace(_LORA, source="Liu et al. 2024, arXiv:2402.09353, NVlabs/DoRA: LoRA's"),
    # 3,000 of 79,700 steps of warm-up: 25 epochs of 204,045 rows, 64 in a step
    "adalora": Rates(
        lr=5e-4,
        warmup=0.04,
        schedule="linear",
        weight_decay=0.0,
        source="Zhang et al. 2023, arXiv:2303.10512, QingruZhang/AdaLoRA, NLG_QA on XSum",
    ),
    "ia3": Rates(
        lr=3e-3,
        warmup=0.06,
        schedule="linear",
        weight_decay=0.0,
        source="Liu et al. 2022, arXiv:2205.05638, r-three/t-few, configs/ia3.json",
    ),
    "adapter": Rates(
        lr=3e-4,
        warmup=0.1,
        schedule="linear",
        weight_decay=0.01,
        source="Houlsby et al. 2019, arXiv:1902.00751, google-research/adapter-bert",
    ),
    "bitfit": Rates(
        lr=1e-3,
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        source="Ben Zaken et al. 2021, arXiv:2106.10199, benzakenelad/BitFit, run_glue.py",
    ),
}


def rates_of(task: TaskName, loss: str, method: str | None) -> Rates:
    """Return the rates with which a pretrained model is gone on from. `loss`: of preferences, for
    the tasks that have them. `method`: of tuning, None if all weights are trained."""
    full = OF_LOSSES[loss] if TASKS[task].compares else OF_TASKS[task]
    if method is None:
        return full
    few = OF_METHODS[method]
    return replace(few, lr=float(f"{few.lr * full.tuned:.3g}"))


def listed(said: Callable[[Rates], str]) -> str:
    """Return what each row says, for the description of a key."""
    rows = (*OF_TASKS.items(), *OF_LOSSES.items(), *OF_METHODS.items())
    return ", ".join(f"{name} {said(rates)}" for name, rates in rows)
