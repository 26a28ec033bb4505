"""Which modules of a network the recipe's words mean. No torch, so that `check` can say it."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.model.config import TransformerConfig
from trainer.model.names import WEIGHT_NAMES
from trainer.sections import Finding, Tuning

GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
TARGETS = "tuning.targets"
PARTS = (".lora_A.weight", ".lora_B.weight")  # of an adapted module, as peft ends their names


def roles_of(tuning: Tuning) -> set[str]:
    """Single projections."""
    return {role for target in tuning.targets for role in GROUPS.get(target, (target,))}


def modules_by_role(config: TransformerConfig, layer: int) -> dict[str, str]:
    """The Hugging Face module of each linear projection of a layer; several have the same where the family fuses them."""
    names = WEIGHT_NAMES[config.family]
    inputs = names.mlp_inputs(config, layer)
    return {
        **{role: output.name for role, output in zip("qkv", names.query_key_value(config, layer), strict=True)},
        "o": names.attention_out.format(layer=layer),
        **{role: output.name for role, output in zip(("gate", "up")[-len(inputs) :], inputs, strict=True)},
        "down": names.mlp_out.format(layer=layer),
    }


def targeted_modules(tuning: Tuning, config: TransformerConfig) -> list[str]:
    """Hugging Face's names of all modules that are adapted, in the order of the model."""
    wanted = roles_of(tuning)
    found = (
        module
        for layer in range(config.num_layers)
        for role, module in modules_by_role(config, layer).items()
        if role in wanted
    )
    return list(dict.fromkeys(found))


def parts_of(module: str) -> list[str]:
    """Logical names of what is trained beside a module's weight."""
    return [module + part for part in PARTS]


def is_added(name: str) -> bool:
    """Whether a logical tensor is none of the model's own."""
    return name.endswith(PARTS)


def target_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    """Words for what the family does not have, or has only together with others."""
    if tuning.method is None:
        return
    modules, wanted = modules_by_role(config, 0), roles_of(tuning)
    keys = (TARGETS, "model.family", "model.from_pretrained", "tuning.method")
    for target in tuning.targets:
        if target not in GROUPS and target not in modules:
            legal = ", ".join([*GROUPS, *modules])
            yield Finding(keys, f'{TARGETS}: family {config.family} has no projection "{target}"; legal: {legal}')
    for module in dict.fromkeys(modules.values()):
        fused = [role for role, of in modules.items() if of == module]
        if not wanted.isdisjoint(fused) and not wanted.issuperset(fused):
            asked = ", ".join(role for role in fused if role in wanted)
            yield Finding(
                keys,
                f"{TARGETS}: family {config.family} holds {', '.join(fused)} in one module ({module.rpartition('.')[2]}), and "
                f"peft's format has one adapter for it, not one for {asked} alone; legal: all of {', '.join(fused)}, or none",
            )
