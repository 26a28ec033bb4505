"""The evaluation of a model in any layout: a task's statistics, log-probabilities and logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_reduce
from parallel.documents import Documents
from parallel.mesh import Mesh
from trainer.data.loader import MicroBatch
from trainer.engine.execution import Execution
from trainer.errors import DataError
from trainer.model.measures import EvalResult, Measures
from trainer.stopwatch import Stopwatch


class Evaluator:
    """A model run without dropout and gradients. Every rank of the mesh must call it together."""

    def __init__(
        self,
        execution: Execution,
        measures: Measures,
        mesh: Mesh,
        device: torch.device,
        watch: Stopwatch,
        *,
        vocab_size: int,
    ) -> None:
        self.mesh, self.device, self.vocab_size = mesh, device, vocab_size
        self._execution, self._measures, self._watch = execution, measures, watch

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[MicroBatch], tokens_per_byte: float | None = None) -> EvalResult:
        """Return the task's statistics over all ranks' micro-batches, and what their texts are in
        tokens per byte. Each rank must bring the same number of micro-batches."""
        self._execution.module.eval()
        sums = torch.zeros(self._measures.num_sums, dtype=torch.float64, device=self.device)
        targets = 0
        for batch in micro_batches:
            sums += self._execution.sums(batch.on(self.device))
            targets += self._measures.num_targets(batch)
            self._watch.tick()
        num_targets = int(all_reduce(torch.tensor(targets, device=self.device), self.mesh.reduction))
        if num_targets == 0:
            raise DataError("the evaluation has no target: every label is masked")
        return EvalResult(tuple(all_reduce(sums, self.mesh.reduction).tolist()), num_targets, tokens_per_byte)

    @torch.no_grad()
    def scores(self, batch: MicroBatch) -> Tensor:
        """Return two numbers for each document of this rank's micro-batch, float64 [2, documents]:
        the log-probability of its targets, and 1 where each target was the likeliest token."""
        self._execution.module.eval()
        return self._execution.scores(batch.on(self.device))

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [V] of the token after `tokens`, fp32 on the CPU."""
        self._execution.module.eval()
        # The padding is a document of its own, so that the tokens divide over the ranks.
        padding = -len(tokens) % self.mesh.tp.size
        tokens_BS = torch.tensor([[*tokens, *[0] * padding]], device=self.device)
        documents = Documents(((len(tokens), padding),) if padding else ((len(tokens),),))
        logits_SV = self._execution.logits(MicroBatch(tokens_BS, documents))
        return all_gather(logits_SV[len(tokens) - 1], self.mesh.tp)[: self.vocab_size].float().cpu()
