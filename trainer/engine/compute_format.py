"""The compute format of a run whose recipe leaves it to the devices of the first start."""

from __future__ import annotations

import torch

from parallel.messages import Messages
from trainer.fine_tuning import LEAST_CAPABILITY
from trainer.schema import Dtype


def format_of_devices(device: torch.device, messages: Messages) -> Dtype:
    """Return bf16 if the devices of all ranks multiply in it, else fp32. `device`: that of this
    rank. All ranks must call it together, and get the same."""
    return "bf16" if all(messages.all(multiplies_in_bf16(device))) else "fp32"


def multiplies_in_bf16(device: torch.device) -> bool:
    """Return whether the device has matrix units for bf16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
