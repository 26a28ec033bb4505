"""Translations by the model in a Hugging Face folder: beam search, BLEU and chrF, and the decoder's
attention.

The search is transformers' own, with its key/value cache: an exported folder translates here as it
does for those who get it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.data.translations import Translation
from trainer.errors import RecipeError
from trainer.files.reading import told
from trainer.inference.model_folder import load_folder

BATCH = 32  # texts translated together, of about the same length
# Tokens. A tokenizer without a limit says 10³⁰, which its own truncation cannot represent.
ENDLESS = 2**30


@dataclass(frozen=True)
class Search:
    """The settings of the search.

    `beams`: 1 takes the likeliest token each time. Finished beams are compared by log-probability /
    length ** `length_penalty`, transformers' simpler form of Wu et al. 2016 (arXiv:1609.08144, §7).
    """

    beams: int = 4
    length_penalty: float = 1.0


@dataclass(frozen=True)
class Scores:
    """The scores of translations against those of people, 0 to 100, and how sacrebleu counted (Post
    2018, arXiv:1804.08771)."""

    bleu: float
    chrf: float
    signature: str


@dataclass(frozen=True)
class Attention:
    """The attention of each target token to each source token: weights [target, source], means over
    the heads of the last layer.

    Rows sum to 1. A row is that of the token that is written next.
    """

    source: list[str]
    target: list[str]
    weights: torch.Tensor

    def draw(self, file: Path) -> None:
        """Draw it as a picture in the format of the suffix. RecipeError if there is no such format,
        or no room for it."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.0 + 0.4 * len(self.source), 1.5 + 0.35 * len(self.target)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(self.weights.numpy(), cmap="Blues", vmin=0.0, aspect="auto")
        axes.set_xticks(range(len(self.source)), self.source, rotation=60, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(self.target)), self.target)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_xlabel("source")
        axes.set_ylabel("target")
        figure.colorbar(image, ax=axes, label="attention", shrink=0.8)
        try:
            figure.savefig(file, dpi=150)
        except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not have
            raise RecipeError(f"--attention {file}: {told(error)}") from None


class Translator:
    """A model with an encoder and a decoder, on a GPU if there is one."""

    def __init__(self, folder: Path) -> None:
        """Load the folder. RecipeError for a model that continues texts, DataError for a folder
        that does not load whole."""
        self._model, self._tokenizer = load_folder(folder)
        if not self._model.config.is_encoder_decoder:
            raise RecipeError(f"{folder}: its model continues texts and has no encoder: give one that translates")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        positions: int = getattr(self._model.config, "max_position_embeddings", self._tokenizer.model_max_length)
        self._positions = min(positions, ENDLESS)
        # transformers 5.23 sizes the cache by T5's encoder layers: too few for a deeper decoder.
        deeper = getattr(self._model.config, "num_decoder_layers", 0) > self._model.config.num_hidden_layers
        self._how: dict[str, Any] = {"use_cache": False} if deeper else {}

    @torch.no_grad()
    def translate(self, texts: Sequence[str], search: Search, *, tick: Callable[[], None] = lambda: None) -> list[str]:
        """Return the translations. `tick` is called after each batch. A text beyond the model's
        positions loses its end."""
        found = [""] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH]
            ids = self._search([texts[index] for index in chosen], search)
            for index, text in zip(chosen, self._tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                found[index] = text.strip()
            tick()
        return found

    @torch.no_grad()
    def attention(self, text: str, search: Search) -> Attention:
        """Return the attention between a text and the translation that is found for it."""
        found = self._search([text], search)
        # Other implementations do not keep the weights.
        self._model.set_attn_implementation("eager")
        sources = self._encoded([text])
        weights = self._model(**sources, decoder_input_ids=found[:, :-1], output_attentions=True).cross_attentions[-1]
        return Attention(self._spelt(sources["input_ids"][0]), self._spelt(found[0, 1:]), weights[0].mean(0).cpu())

    def _spelt(self, ids: torch.Tensor) -> list[str]:
        return [self._tokenizer.decode([token]) for token in ids.tolist()]

    def _encoded(self, texts: Sequence[str]) -> Any:
        encode = self._tokenizer
        return encode(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._positions,
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(self._device)

    def _search(self, texts: Sequence[str], search: Search) -> torch.Tensor:
        """Return the token ids of the translations, int64 [texts, tokens]."""
        sources = self._encoded(texts)
        longest = min(self._positions - 1, 2 * sources["input_ids"].shape[1] + 20)
        how = {"length_penalty": search.length_penalty, **self._how} if search.beams > 1 else self._how
        found: torch.Tensor = self._model.generate(
            **sources, num_beams=search.beams, do_sample=False, max_new_tokens=longest, **how
        )
        return found


def scores(
    translator: Translator, pairs: Sequence[Translation], search: Search, *, tick: Callable[[], None] = lambda: None
) -> Scores:
    """Return BLEU and chrF of the sources' translations, measured against the pairs' targets."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    found = translator.translate([pair.source for pair in pairs], search, tick=tick)
    references = [[pair.target for pair in pairs]]
    bleu, chrf = BLEU(), CHRF()
    of_bleu, of_chrf = bleu.corpus_score(found, references), chrf.corpus_score(found, references)
    signature = f"BLEU {bleu.get_signature()}; chrF {chrf.get_signature()}"
    return Scores(bleu=round(of_bleu.score, 2), chrf=round(of_chrf.score, 2), signature=signature)
