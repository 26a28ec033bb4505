"""Cases of tuning: one of each method, small enough for every layout, and adapters in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.parallel.training import Case

LORA = {"method": "lora", "rank": 4, "alpha": 8.0}
WIDE = {"hidden_size": 256, "intermediate_size": 256}  # four tensor ranks have whole blocks of 64 inputs each
BUDGET = {"target_rank": 2, "warmup_steps": 3, "final_steps": 5}
ADALORA = {"method": "adalora", "rank": 4, "alpha": 8.0, "budget": BUDGET}
METHODS = {
    "dora": Case(tuning={**LORA, "method": "dora"}, clip_norm=0.1, steps=4, config={"num_hidden_layers": 4}),
    "ia3": Case(tuning={"method": "ia3"}, clip_norm=0.003, steps=4, config={"num_hidden_layers": 4}),
    "adalora": Case(
        tuning={**ADALORA, "dropout": 0.1, "budget": {"target_rank": 2, "final_steps": 2}},
        clip_norm=0.1,
        steps=5,
        config={"num_hidden_layers": 4},
    ),
    "qlora": Case(tuning={**LORA, "quantize": "nf4"}, clip_norm=0.1, steps=3, config={**WIDE, "num_hidden_layers": 4}),
    **{
        f"quantized-{tuning['method']}": Case(
            tuning={**tuning, "quantize": form}, clip_norm=norm, steps=4, config={**WIDE, "num_hidden_layers": 4}
        )
        for tuning, form, norm in (
            ({"method": "ia3"}, "int8", 0.003),
            ({**ADALORA, "budget": {"target_rank": 2, "final_steps": 2}}, "nf4", 0.1),
            ({"method": "adapter", "bottleneck": 6}, "nf4", 0.03),
        )
    },
    "adapter": Case(tuning={"method": "adapter", "bottleneck": 6}, clip_norm=0.03, steps=4, config={"num_hidden_layers": 4}),
    "bitfit": Case(family="gpt2", tuning={"method": "bitfit"}, clip_norm=0.1, steps=4, config={"n_layer": 4}),
}


def with_bottlenecks(model: nn.Module, adapter: Path) -> nn.Module:
    """The adapters of Houlsby et al. 2019, figure 2, in plain torch, with the values of a folder."""
    from safetensors.torch import load_file

    for name, tensor in load_file(adapter / "bottleneck.safetensors").items():
        module, part, kind = name.rsplit(".", 2)
        projection = model.get_submodule(module)
        if not hasattr(projection, part):
            setattr(projection, part, nn.Module())
        setattr(getattr(projection, part), kind, nn.Parameter(tensor))

    def adapted(projection: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
        inner = functional.gelu(y @ projection.adapter_down.weight.T + projection.adapter_down.bias)
        return y + inner @ projection.adapter_up.weight.T + projection.adapter_up.bias

    for projection in [module for module in model.modules() if hasattr(module, "adapter_down")]:
        projection.register_forward_hook(adapted)
    return model
