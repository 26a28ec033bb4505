"""The way in which the ranks of a tensor group share a layer's work.

Shape letters: N tokens of a micro-batch, rows one after another; D model.

Inside a parallel region (from a column-parallel layer to the row-parallel one behind it) a rank has
all N tokens and some of the features. Between the regions it has all features [N, D]. With sequence
parallelism (Korthikanti et al. 2022, arXiv:2205.05198, §4.2.2) it has there only its share of the
tokens, [N/p, D], so that norms, dropout and residuals are divided too. The tokens are divided flat,
not row by row: a share is one contiguous piece of memory, and p need only divide N.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parallel.collectives import copy_to_group, gather_tokens, reduce_from_group, scatter_tokens
from parallel.deferred import WeightGradients
from parallel.mesh import Group


@dataclass(frozen=True)
class TensorParallel:
    """A tensor group and how it works together; every parallel layer takes one.

    `sequence`: divide the tokens between the parallel regions. `overlap`: run the collectives of a
    column-parallel layer's backward beside its matrix products; without it they run alone, in the
    same places, and the results are equal bit by bit. `deferred`: the queue in which linear layers
    leave their weight gradients, for schedules that compute them later.
    """

    group: Group
    sequence: bool
    overlap: bool = True
    deferred: WeightGradients | None = None

    @classmethod
    def alone(cls) -> TensorParallel:
        """Return a group of one rank that has everything, so that the layers are plain layers."""
        return cls(Group.alone(), sequence=False)

    def enter(self, x_ND: Tensor) -> Tensor:
        """Enter a parallel region: return all N tokens. Backward sums the ranks' gradients."""
        return gather_tokens(x_ND, self.group) if self.sequence else copy_to_group(x_ND, self.group)

    def leave(self, y_ND: Tensor) -> Tensor:
        """Leave a parallel region: return the sum of the ranks' parts, with sequence parallelism
        this rank's tokens of it."""
        return scatter_tokens(y_ND, self.group) if self.sequence else reduce_from_group(y_ND, self.group)

    def tokens(self, num_tokens: int) -> slice:
        """Return the slice of a micro-batch's tokens that this rank has between the regions."""
        if not self.sequence:
            return slice(0, num_tokens)
        share = self.group.part(num_tokens, "tokens of a micro-batch")
        return slice(self.group.rank * share, (self.group.rank + 1) * share)
