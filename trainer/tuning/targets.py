"""The modules of a network that the recipe's words mean. No torch, so that `check` can name
them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.model.config import TransformerConfig
from trainer.model.names import names_of
from trainer.schema import Finding, Recipe, Tuning
from trainer.tuning.methods import METHODS, method_of, names_of_methods

TARGETS = "tuning.targets"
QUANTIZED_TOGETHER = 64  # as parallel.quantized has it, which needs torch

# The rows of new tokens that are trained beside a frozen matrix over the vocabulary: peft's ending.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


def targets_of(tuning: Tuning) -> tuple[str, ...]:
    """Return the words of the recipe, or the method's own."""
    return method_of(tuning).targets if tuning.targets is None else tuple(tuning.targets)


def roles_of(tuning: Tuning) -> set[str]:
    """Return the single projections that are adapted."""
    words = method_of(tuning).words
    return {role for target in targets_of(tuning) for role in words.get(target, ())}


def modules_by_role(config: TransformerConfig, layer: int) -> dict[str, str]:
    """Return the Hugging Face module of each linear projection of a layer, by role.

    Several roles have the same module if the family fuses them.
    """
    names = names_of(config)
    inputs = names.mlp_inputs(config, layer)
    return {
        **{role: output.name for role, output in zip("qkv", names.query_key_value(config, layer), strict=True)},
        "o": names.attention_out.format(layer=layer),
        **{role: output.name for role, output in zip(("gate", "up")[-len(inputs) :], inputs, strict=True)},
        "down": names.mlp_out.format(layer=layer),
    }


def targeted_modules(tuning: Tuning, config: TransformerConfig) -> list[str]:
    """Return the Hugging Face names of all modules that are adapted, in the order of the model."""
    wanted = roles_of(tuning)
    found = (
        module
        for layer in range(config.num_layers)
        for role, module in modules_by_role(config, layer).items()
        if role in wanted
    )
    return list(dict.fromkeys(found))


def target_modules(tuning: Tuning, config: TransformerConfig, *, among: Collection[str] | None = None) -> list[str]:
    """Return endings of modules' names, as short as they are unambiguous: "q_proj", but
    "attn.c_proj" where the MLP has one too.

    `among`: only of these modules of the first layer.
    """
    adapted = set(targeted_modules(tuning, config))
    layer = dict.fromkeys(modules_by_role(config, 0).values())
    chosen = adapted if among is None else adapted.intersection(among)
    names = names_of(config)
    of_head = filter(None, (names.head_transform, names.pooler))
    others = {module.rpartition(".")[2] for module in (*layer, *of_head) if module not in chosen}

    def ending(module: str) -> str:
        last = module.rpartition(".")[2]
        return ".".join(module.split(".")[-2:]) if last in others else last

    return sorted({ending(module) for module in layer if module in chosen})


def parts_of(tuning: Tuning, module: str) -> list[str]:
    """Return the logical names of what is trained beside a module's weight."""
    return [module + part for part in method_of(tuning).parts]


def is_added(name: str) -> bool:
    """Return whether a logical tensor is not one of the model's own."""
    return name.endswith((TOKEN_ROWS, *(part for method in METHODS.values() for part in method.parts)))


def token_rows(tuning: Tuning, config: TransformerConfig) -> dict[str, str]:
    """Return the name of the rows of new tokens beside each matrix over the vocabulary."""
    if tuning.method is None or not config.new_tokens:
        return {}
    names = names_of(config)
    weights = [names.embedding] if config.tied_head or config.classes else [names.embedding, names.head]
    return {weight: rows_name(weight) for weight in weights}


def rows_name(weight: str) -> str:
    """Return the name of the rows of new tokens of such a matrix."""
    return weight.removesuffix(".weight") + TOKEN_ROWS


def target_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    """Yield a finding for each word that the method or the family cannot adapt by itself."""
    method = method_of(tuning)
    if method.trains_biases:
        yield from _bias_findings(tuning, config)
    if method.words:
        yield from _word_findings(tuning, config)
        yield from _fused_findings(tuning, config)


def quantization_findings(recipe: Recipe, config: TransformerConfig) -> Iterator[Finding]:
    """Yield a finding if a row's end or a border between ranks cuts a block of inputs."""
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


def _bias_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    if not (config.qkv_bias or config.attention_out_bias or config.mlp_bias or config.norm_bias):
        others = ", ".join(names_of_methods(lambda method: not method.trains_biases))
        yield Finding(
            ("tuning.method", "model.family", "model.from_pretrained"),
            f'tuning.method = "{tuning.method}" trains biases, and this {config.family} has none; legal: {others}',
        )


def _word_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    words, there = method_of(tuning).words, modules_by_role(config, 0).keys()
    legal = [word for word, roles in words.items() if not there.isdisjoint(roles)]
    for target in targets_of(tuning):
        if target not in words:
            yield Finding(
                (TARGETS, "tuning.method"),
                f'{TARGETS}: {tuning.method} is put behind a whole {" or ".join(legal)}, not beside "{target}"; '
                f"legal: {', '.join(legal)}",
            )
        elif target not in legal:
            yield Finding(
                (TARGETS, "model.family", "model.from_pretrained", "tuning.method"),
                f'{TARGETS}: family {config.family} has no projection "{target}"; legal: {", ".join(legal)}',
            )


def _fused_findings(tuning: Tuning, config: TransformerConfig) -> Iterator[Finding]:
    modules, wanted = modules_by_role(config, 0), roles_of(tuning)
    for module in dict.fromkeys(modules.values()):
        fused = [role for role, of in modules.items() if of == module]
        if not wanted.isdisjoint(fused) and not wanted.issuperset(fused):
            asked = ", ".join(role for role in fused if role in wanted)
            yield Finding(
                (TARGETS, "model.family", "model.from_pretrained", "tuning.method"),
                f"{TARGETS}: family {config.family} holds {', '.join(fused)} in one module ({module.rpartition('.')[2]}), and "
                f"peft's format has one adapter for it, not one for {asked} alone; legal: all of {', '.join(fused)}, or none",
            )
