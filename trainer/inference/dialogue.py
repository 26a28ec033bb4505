"""A conversation with a model: its turns, and what fits of them into the model's context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.data.chat import Chat
from trainer.data.conversations import SHAPES, Turns
from trainer.data.fault import Fault
from trainer.data.tokenizer_loading import load_tokenizer
from trainer.errors import RecipeError
from trainer.inference.generate import ends_of_answers, taught_to_answer, template_of
from trainer.inference.model_folder import ModelFolder
from trainer.inference.shown import TextStream, text_of
from trainer.inference.text_model import TextModel, Writing

Row = dict[str, str]  # a turn in the form of the rows that data.task sft reads


def require_template(found: ModelFolder, *, named: str) -> tuple[Chat, list[str]]:
    """Return the chat template of a model, and what its user must know of it. RecipeError for a
    model without one. `named`: the model on the command line."""
    tokenizer = load_tokenizer(str(found.tokenizer))
    if not tokenizer.has_template:
        raise RecipeError(
            f"the tokenizer in {found.tokenizer} has no chat template, so its model was taught no conversation: have it "
            f"continue a text, triaxis generate {named} --prompt TEXT"
        )
    taught, why = taught_to_answer(found, tokenizer)
    remark = f"{why}: it has a chat template, and was perhaps never taught to answer"
    return template_of(found), [] if taught else [remark]


@dataclass(frozen=True)
class Reply:
    """An answer, and what a user must know of it.

    `forgotten`: how many of the oldest questions, with their answers, no longer fit, if that is
    news. `cut`: the tokens after which the answer was cut, 0 if it ended by itself.
    """

    text: str
    forgotten: int = 0
    cut: int = 0
    stopped: bool = False


class Dialogue:
    """The conversation. `system`: what its system says, or None."""

    def __init__(self, model: TextModel, chat: Chat, writing: Writing, *, system: str | None = None) -> None:
        """Begin a conversation. RecipeError if the template has no place for the system's text."""
        self._model = model
        self._chat = chat
        self._writing = writing
        self._ends = ends_of_answers(model.found, chat)
        self._exchanges: list[tuple[Row, Row]] = []
        self._first = 0  # the first exchange that the model still sees
        self.system: str | None = None
        if system is not None:
            self.set_system(system, key="--system")

    @property
    def messages(self) -> list[Row]:
        """The turns so far, the system's first."""
        return [*self._opening(self.system), *(turn for exchange in self._exchanges for turn in exchange)]

    def set_system(self, text: str | None, *, key: str = "/system") -> None:
        """Have the system say this from now on, at the beginning of the conversation. RecipeError,
        which names `key`, if the template refuses it, or leaves it out."""
        probe = [_turn("user", "x")]
        if text is not None:
            try:
                is_left_out = self._tokens(probe) == self._tokens([*self._opening(text), *probe])
            except Fault as fault:
                raise RecipeError(f"{key}: {fault}") from None
            if is_left_out:
                raise RecipeError(f"{key}: the chat template leaves it out, or writes the same by itself: leave it out too")
        self.system = text

    def reset(self) -> None:
        """Forget all questions and answers."""
        self._exchanges, self._first = [], 0

    def undo(self) -> str | None:
        """Take back the last question, with its answer, and return it; None if there is none."""
        if not self._exchanges:
            return None
        question, _ = self._exchanges.pop()
        self._first = min(self._first, len(self._exchanges))
        return question["content"]

    def ask(self, text: str, show: Callable[[str], None]) -> Reply:
        """Ask a question, show the answer piece by piece, and remember both.

        An answer that is stopped is remembered as far as it came. RecipeError if the template
        refuses the question, or the model has no room for it.
        """
        question = _turn("user", text)
        first, tokens = self._fitting(question)
        forgotten, self._first = (first if first > self._first else 0), first
        stream = TextStream(self._model.tokenizer, show)
        found = self._model.more(tokens, self._writing, ends=self._ends, hear=stream.put)
        stream.end()
        said = text_of(self._model.tokenizer, found.tokens)
        if said or not found.stopped:
            self._exchanges.append((question, _turn("assistant", said)))
        cut = 0 if found.ended or found.stopped else len(found.tokens)
        return Reply(said, forgotten, cut, found.stopped)

    def _fitting(self, question: Row) -> tuple[int, list[int]]:
        """Return the first exchange that fits, and the tokens from there to the answer.

        The oldest are left out until half of the context is free, or as much as the longest answer
        takes. A question by itself may take all but one token.
        """
        positions = self._model.positions
        free, tokens = min(self._writing.new_tokens, positions // 2), [0]
        for first in range(self._first, len(self._exchanges) + 1):
            seen = [turn for exchange in self._exchanges[first:] for turn in exchange]
            try:
                tokens = self._tokens([*self._opening(self.system), *seen, question])
            except Fault as fault:
                raise RecipeError(f"the message: {fault}") from None
            if len(tokens) + free <= positions:
                return first, tokens
        if len(tokens) >= positions:
            raise RecipeError(
                f"the message takes {len(tokens):,} tokens with its template, and the model has {positions:,} positions: "
                "shorten it, or the system's text"
            )
        return len(self._exchanges), tokens

    def _opening(self, system: str | None) -> list[Row]:
        return [] if system is None else [_turn("system", system)]

    def _tokens(self, messages: list[Row]) -> list[int]:
        turns: Turns = SHAPES["messages"].read({"messages": messages})
        return self._chat.asked(turns)


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}
