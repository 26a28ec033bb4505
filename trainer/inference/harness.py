"""A model in any layout, in the form of EleutherAI's lm-evaluation-harness (the optional package
lm-eval).

Every rank runs the harness on all its requests, which come in the same order everywhere. Each
data-parallel rank scores its share of them, and they exchange the results. Generation computes the
whole context again for each token: right in every layout, but slow. For benchmarks of long answers,
give an exported folder to the harness's own `--model hf`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from parallel.collectives import all_reduce
from parallel.documents import Documents
from parallel.loss import IGNORE
from trainer.data.chat_template import ChatTemplate, Request
from trainer.data.loader import MicroBatch
from trainer.data.texts import Texts
from trainer.errors import RecipeError
from trainer.inference.generate import ends_of
from trainer.inference.model_folder import ModelFolder
from trainer.inference.open_model import OpenModel, open_model
from trainer.launch.ranks import together

NEW_TOKENS = 256  # for tasks that name no limit, as in the harness's own models
Scored = list[tuple[float, bool]]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model asked by all its ranks together. `chat`: questions come as conversations, whose
    special tokens are spelt."""

    def __init__(self, model: OpenModel, *, chat: bool) -> None:
        super().__init__()
        self._model, self._chat = model, chat
        self._ends = {model.tokenizer.end_of_document, *ends_of(ModelFolder(model.weights.config))}
        self.max_length: int = model.network.max_positions or model.recipe.data.seq_len

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.end_of_document

    @property
    def tokenizer_name(self) -> str:
        return str(self._model.weights.config)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the one that begins texts, or else the end of
        a document."""
        return self._opening[-1] if self._opening else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Return the tokens of a text, which begins as in training and in the harness's own models.

        A chat template writes its beginning itself.
        """
        opening = () if self._chat or add_special_tokens is False else self._opening
        return [*opening, *self._model.tokenizer.encode_with_offsets(string, special=self._chat)[0]]

    @property
    def _opening(self) -> tuple[int, ...]:
        data, tokenizer = self._model.recipe.data, self._model.tokenizer
        return Texts.from_recipe(data, tokenizer).opening

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> Scored:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, with each token predicted once.

        A text is divided into windows, of which all but the first begin with the end of the one
        before.
        """
        windows, of_text = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in _windows(tokens, self.prefix_token_id, self.max_length):
                windows.append(window)
                of_text.append(number)
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(of_text, self._score(windows), strict=True):
            totals[number] += log_prob
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the likeliest tokens, one after another. RecipeError if a task wants them
        drawn."""
        return [self._generate(*request.args) for request in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        tokenizer = self._model.tokenizer
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        return template.render(Request(chat_history), add_generation_prompt=add_generation_prompt)

    def _generate(self, context: str, how: dict[str, Any]) -> str:
        if how.get("do_sample") or how.get("temperature", 0.0):
            raise RecipeError("--harness: this task draws its answers at random; here they are the likeliest tokens")
        stops = [how["until"]] if isinstance(how.get("until"), str) else list(how.get("until") or ())
        new_tokens = int(how.get("max_gen_toks", NEW_TOKENS))
        tokens = self.tok_encode(context)[-max(1, self.max_length - new_tokens) :] or [self.prefix_token_id]
        begin, text = len(tokens), ""
        for _ in range(new_tokens):
            token = int(self._model.evaluator.next_logits(tokens[-self.max_length :]).argmax())
            if token in self._ends:
                break
            tokens.append(token)
            text = self._model.tokenizer.decode(tokens[begin:])
            if found := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(found)]
        return text

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Scored:
        """Return, for each continuation, its log-probability after its context, and whether the
        likeliest tokens would write it.

        A context too long for the model loses its beginning.
        """
        dp, device = self._model.mesh.data, self._model.evaluator.device
        found_2R = torch.zeros((2, len(pairs)), dtype=torch.float64, device=device)
        longest_first = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        mine, size = longest_first[dp.rank :: dp.size], self._model.plan.micro_sequences
        for numbers in (mine[begin : begin + size] for begin in range(0, len(mine), size)):
            found_2R[:, numbers] = self._of_batch([pairs[number] for number in numbers])
        found_2R = all_reduce(found_2R, dp)
        return [(log_prob, bool(is_likeliest)) for log_prob, is_likeliest in found_2R.t().tolist()]

    def _of_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Return the scores [2, pairs]. Each pair is a row, filled up with a document without
        targets."""
        rows = [(context + continuation)[-self.max_length - 1 :] for context, continuation in pairs]
        S = max(len(row) - 1 for row in rows)
        S += -S % self._model.mesh.tp.size
        tokens_BS = torch.full((len(rows), S), self.eot_token_id)
        labels_BS = torch.full((len(rows), S), IGNORE)
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            length, targets = len(row) - 1, min(len(continuation), len(row) - 1)
            tokens_BS[number, :length] = torch.tensor(row[:-1])
            labels_BS[number, length - targets : length] = torch.tensor(row[-targets:])
        documents = tuple((len(row) - 1, S - len(row) + 1) if len(row) - 1 < S else (S,) for row in rows)
        scores_2R = self._model.evaluator.scores(MicroBatch(tokens_BS, Documents(documents), labels_BS))
        firsts = [0]
        for lengths in documents[:-1]:
            firsts.append(firsts[-1] + len(lengths))
        return scores_2R[:, firsts]


def _windows(tokens: list[int], prefix: int, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, continuation) of at most `longest` predictions each."""
    for begin in range(0, len(tokens), longest):
        part = tokens[begin : begin + longest]
        known = [prefix, *tokens[:begin]]
        yield known[-(longest + 1 - len(part)) :], part


def run_harness(
    weights: str,
    settings: Sequence[str],
    *,
    tasks: Sequence[str],
    folder: Path | None,
    few_shot: int | None,
    limit: int | None,
    chat: bool,
) -> dict[str, Any] | None:
    """Return what was asked, and the harness's results by task; None on all ranks but the first.

    `folder`: the user's own tasks. `limit`: examples of each task.
    """
    with open_model(weights, settings) as model, ExitStack() as stack, together():
        if not model.place.is_first:  # the first rank reports for all
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=False)
        # The harness has thousands of tasks of its own, which take seconds to list.
        if not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(folder) if folder else None)
        if unknown := [task for task in tasks if task not in manager.all_tasks]:
            raise RecipeError(
                f"--harness {unknown[0]}: no such task; lm-eval ls tasks lists them, --harness-path adds a folder"
            )
        found = simple_evaluate(
            HarnessModel(model, chat=chat),
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {**model.described, "tasks": dict(found["results"])} if model.place.is_first and found else None
