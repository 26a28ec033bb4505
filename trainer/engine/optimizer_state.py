"""What each update rule keeps of a parameter. No torch: the size of a checkpoint is asked before anything is loaded."""

from __future__ import annotations

from trainer.schema import Optimizer

WEIGHT = "weight"  # the state of every weight; the others have the optimizer's own names, such as exp_avg


def state_names(keys: Optimizer) -> tuple[str, ...]:
    """What the rule keeps of each parameter beside its weight."""
    match keys.name:
        case "adamw" | "adam":
            return ("exp_avg", "exp_avg_sq")
        case "lion":
            return ("exp_avg",)
        case "sgd":
            return ("momentum_buffer",) if keys.momentum else ()
        case "adafactor":
            return ("row_var", "col_var", "variance")  # the first two of matrices, the last of vectors


def states_per_element(keys: Optimizer) -> int:
    """How many of them have the weight's own shape; Adafactor's are smaller by orders of magnitude."""
    return 0 if keys.name == "adafactor" else len(state_names(keys))
