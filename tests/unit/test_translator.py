"""Translating with an exported folder: the search is transformers', scores are sacrebleu's, a picture shows the attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from parallel.params import owned_specs
from tests.unit.oracle import random_translator
from tests.unit.shapes import MARIAN, T5
from tests.unit.stages import stage_from
from trainer.cli import main
from trainer.data.tokenizer_loading import make_tokenizer
from trainer.data.translations import Translation
from trainer.errors import RecipeError
from trainer.inference.translator import Search, Translator, scores
from trainer.model.hugging_face import write_folder
from trainer.model.model_files import ModelFiles

TEXTS = ["a dog", "two dogs in the snow run", "", "b"]


MODELS = {
    "marian": {**MARIAN, "vocab_size": 257, "decoder_vocab_size": 257},
    "t5": {**T5, "vocab_size": 257},
}
# Tokens of a translation at most: all positions, or by the length of the longest text.
LONGEST = {"marian": 39, "t5": 2 * 25 + 20}


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    family: str = request.param
    return family


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run exports it, of random weights."""
    root = tmp_path_factory.mktemp("translator")
    random_translator(family, MODELS[family]).save_pretrained(root / "theirs")
    stage = stage_from(root / "theirs")
    files = ModelFiles(stage.config, make_tokenizer("bytes").ending_texts(), "float32")
    tensors = ((spec, parameter.detach()) for _, parameter, spec in owned_specs(stage))
    write_folder(tensors, root / "model", dtype=torch.float32, config=files.config, save_beside=files.save_others)
    return root / "model"


@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_translates_as_transformers_does_one_by_one(beams: int, family: str, folder: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([[*text.encode(), 256]])  # as training ends a source
        how = {"max_new_tokens": LONGEST[family], "length_penalty": 1.0, "do_sample": False, "use_cache": family != "t5"}
        found = model.generate(input_ids=ids, num_beams=beams, **how)
        expected.append(tokenizer.decode(found[0], skip_special_tokens=True).strip())
    assert Translator(folder).translate(TEXTS, Search(beams)) == expected
    assert len(set(expected)) > 1, "all alike, and the order would not show"


def test_scores_of_its_own_translations_are_perfect(folder: Path) -> None:
    translator = Translator(folder)
    texts = ["a dog", "two dogs in the snow run"]
    found = translator.translate(texts, Search())
    perfect = scores(translator, [Translation(*pair) for pair in zip(texts, found, strict=True)], Search())
    assert perfect.chrf == pytest.approx(100.0)
    assert "tok:13a" in perfect.signature
    assert scores(translator, [Translation(text, "nothing of the kind") for text in texts], Search()).bleu < 5.0


def test_attention_is_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention = Translator(folder).attention("a dog", Search())
    assert attention.source == [*"a dog", "<|endoftext|>"]
    assert attention.weights.shape == (len(attention.target), len(attention.source))
    torch.testing.assert_close(attention.weights.sum(1), torch.ones(len(attention.target)))
    picture = tmp_path / "attention.png"
    assert main(["generate", str(folder), "--prompt", "a dog", "--attention", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == Translator(folder).translate(["a dog"], Search())[0]
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 50


def test_a_model_that_continues_texts_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    make_tokenizer("bytes").save(tmp_path)
    with pytest.raises(RecipeError, match="continues texts and has no encoder"):
        Translator(tmp_path)
