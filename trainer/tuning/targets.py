"""Which modules of a network the recipe's words mean. No torch, so that `check` can say it."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.model.config import TransformerConfig
from trainer.model.names import names_of
from trainer.schema import Finding, Recipe, Tuning

GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
# Where a bottleneck adapter sits: behind the last projection of the attention, and of the MLP.
ENDS = {"attention": ("o",), "mlp": ("down",)}
TARGETS = "tuning.targets"
QUANTIZED_TOGETHER = 64  # as parallel.quantized has it, which needs torch
# What is adapted when the recipe does not say: all for low-rank factors (Dettmers et al. 2023, arXiv:2305.14314, §4), and
# what the papers of (IA)³ and of bottleneck adapters adapt.
DEFAULTS = {
    "lora": ("attention", "mlp"),
    "dora": ("attention", "mlp"),
    "adalora": ("attention", "mlp"),
    "ia3": ("k", "v", "down"),
    "adapter": ("attention", "mlp"),
}
# What is trained beside an adapted module, as peft ends the names; it has no bottleneck adapters.
PARTS = {
    "lora": (".lora_A.weight", ".lora_B.weight"),
    "dora": (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
    "adalora": (".lora_A", ".lora_B", ".lora_E"),
    "ia3": (".ia3_l",),
    "adapter": (".adapter_down.weight", ".adapter_down.bias", ".adapter_up.weight", ".adapter_up.bias"),
}


# The rows of new tokens that are trained beside a frozen matrix over the vocabulary, as peft ends their names.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

# Methods that peft has; what they learn can be put into the weights that it was learned for.
MERGEABLE = tuple(method for method in PARTS if method != "adapter")


def targets_of(tuning: Tuning) -> tuple[str, ...]:
    """Words of the recipe, or the method's own."""
    return tuple(tuning.targets) if tuning.targets is not None else DEFAULTS.get(str(tuning.method), ())


def roles_of(tuning: Tuning) -> set[str]:
    """Single projections."""
    groups = ENDS if tuning.method == "adapter" else GROUPS
    return {role for target in targets_of(tuning) for role in groups.get(target, (target,))}


def modules_by_role(config: TransformerConfig, layer: int) -> dict[str, str]:
    """The Hugging Face module of each linear projection of a layer; several have the same where the family fuses them."""
    names = names_of(config)
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


def parts_of(tuning: Tuning, module: str) -> list[str]:
    """Logical names of what is trained beside a module's weight."""
    return [module + part for part in PARTS[str(tuning.method)]]


def is_added(name: str) -> bool:
    """Whether a logical tensor is none of the model's own."""
    return name.endswith(TOKEN_ROWS) or any(name.endswith(parts) for parts in PARTS.values())


def token_rows(tuning: Tuning, config: TransformerConfig) -> dict[str, str]:
    """Each matrix over the vocabulary of which the rows of new tokens are trained beside it → the name of these rows."""
    if tuning.method is None or not config.new_tokens:
        return {}
    names = names_of(config)
    weights = [names.embedding] if config.tied_head or config.classes else [names.embedding, names.head]
    return {weight: rows_name(weight) for weight in weights}


def rows_name(weight: str) -> str:
    return weight.removesuffix(".weight") + TOKEN_ROWS


def target_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    """Words for what the family does not have, or has only together with others."""
    if tuning.method == "bitfit":
        yield from _bias_findings(config)
    elif tuning.method == "adapter":
        yield from _end_findings(tuning)
    elif tuning.method is not None:
        yield from _projection_findings(tuning, config)


def quantization_findings(recipe: Recipe, config: TransformerConfig) -> Iterator[Finding]:
    """Where a block of neighbouring inputs would be cut, by a row's end or between tensor ranks."""
    if recipe.tuning.quantize is None:
        return
    degree = recipe.parallel.tensor
    heads = config.num_heads * config.head_dim
    for what, features, parts in (
        ("attention and MLP", config.hidden_size, 1),
        ("the attention's output projection", heads, degree),
        ("the MLP's output projection", config.ffn_size, degree),
    ):
        if features % (parts * QUANTIZED_TOGETHER):
            share = f"{features}" if parts == 1 else f"{features} / parallel.tensor {parts} = {features / parts:g}"
            yield Finding(
                ("tuning.quantize", "parallel.tensor", "model.family", "model.from_pretrained"),
                f"tuning.quantize: {QUANTIZED_TOGETHER} inputs are quantized together, and {what} has {share} of them; "
                "legal: a multiple of it, by another parallel.tensor or network, or no tuning.quantize",
            )
            return  # the first says what to do


def _bias_findings(config: TransformerConfig) -> Iterator[Finding]:
    if not (config.qkv_bias or config.attention_out_bias or config.mlp_bias or config.norm_bias):
        yield Finding(
            ("tuning.method", "model.family", "model.from_pretrained"),
            f'tuning.method = "bitfit" trains biases, and this {config.family} has none; legal: {", ".join(PARTS)}',
        )


def _end_findings(tuning: Tuning) -> Iterator[Finding]:
    for target in targets_of(tuning):
        if target not in ENDS:
            yield Finding(
                (TARGETS, "tuning.method"),
                f'{TARGETS}: an adapter sits behind a whole attention or MLP, not beside "{target}"; legal: {", ".join(ENDS)}',
            )


def _projection_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    modules, wanted = modules_by_role(config, 0), roles_of(tuning)
    keys = (TARGETS, "model.family", "model.from_pretrained", "tuning.method")
    for target in targets_of(tuning):
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
