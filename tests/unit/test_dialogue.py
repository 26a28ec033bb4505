"""A conversation reads each token once, where the model's cache allows it, and answers as without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.end_to_end.chats import chat_model, with_template
from trainer.inference.dialogue import Dialogue, require_template
from trainer.inference.model_folder import opened
from trainer.inference.text_model import TextModel, Writing

QUESTIONS = ("double 3", "and what of 4?", "and 5?")


def begun(folder: Path, new_tokens: int = 8) -> tuple[Dialogue, list[int]]:
    """A dialogue, and the list to which the tokens of each of the model's calls are added."""
    read: list[int] = []
    with opened(str(folder)) as found:
        chat, _ = require_template(found, named=str(folder))
        model = TextModel(found, seed=0)
    model._model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    return Dialogue(model, chat, Writing(new_tokens, 0.0, None)), read


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    dialogue, read = begun(chat_model(tmp_path / "model"))
    dialogue.ask(QUESTIONS[0], lambda piece: None)
    assert read[0] == len("user: double 3") + 1 + len("assistant: ")
    assert set(read[1:]) == {1}
    answer = dialogue.messages[-1]["content"]
    read.clear()
    dialogue.ask(QUESTIONS[1], lambda piece: None)
    # At most the answer, whose bytes that were no character are other tokens now, and what follows it.
    assert read[0] <= len(answer.encode()) + 1 + len(f"user: {QUESTIONS[1]}") + 1 + len("assistant: ")
    dialogue.undo()
    read.clear()
    dialogue.ask(QUESTIONS[1], lambda piece: None)
    assert read[0] == 1, "all but the last token are known"


def window(folder: Path) -> Path:
    """A model that forgets what is further back than its window, so its cache cannot be cut back."""
    torch.manual_seed(3)
    shape = transformers.MistralConfig(
        **{"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4, "sliding_window": 16},
        **{"bos_token_id": None, "eos_token_id": 257},
    )
    transformers.MistralForCausalLM(shape).save_pretrained(folder)
    return with_template(folder)


@pytest.mark.parametrize("make", [chat_model, window])
def test_answers_are_those_of_a_dialogue_that_begins_anew(make: object, tmp_path: Path) -> None:
    assert callable(make)
    folder = make(tmp_path / "model")
    dialogue, _ = begun(folder)
    for question in QUESTIONS:
        dialogue.ask(question, lambda piece: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for turn in (1, 3, 5):
        before, answer = dialogue.messages[:turn], dialogue.messages[turn]["content"]
        ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        how = {"max_new_tokens": 8, "do_sample": False, "use_cache": False, "eos_token_id": [256, 257], "pad_token_id": 256}
        out = model.generate(**ids, **how)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == answer


def test_an_interrupted_answer_leaves_no_half_cache(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "model")
    dialogue, _ = begun(folder)
    dialogue.ask(QUESTIONS[0], lambda piece: None)

    def stop(piece: str) -> None:
        if not shown:
            shown.append(piece)
            raise KeyboardInterrupt
        shown.append(piece)

    shown: list[str] = []
    reply = dialogue.ask(QUESTIONS[1], stop)
    assert reply.stopped
    assert "".join(shown) == reply.text != ""
    assert dialogue.undo() == QUESTIONS[1]
    dialogue.ask(QUESTIONS[1], lambda piece: None)
    straight, _ = begun(folder)
    for question in QUESTIONS[:2]:
        straight.ask(question, lambda piece: None)
    assert dialogue.messages == straight.messages
