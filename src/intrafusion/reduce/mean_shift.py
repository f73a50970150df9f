"""Variance-based pruning and FLAP: channels that vary little go, and their means go to the readers' biases."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.reduce.problem import Moments, ReductionMap, ReductionProblem
from intrafusion.reduce.select import Select, most_important, selection_map


@dataclass(frozen=True)
class VarianceBased:
    r"""Keep the m channels that vary most where they are read; for the others their means are read.

    With mu_j and C_jj the mean and the variance of channel j,

        score_j = C_jj,    b <- b + sum of W_j mu_j over the channels j that go.

    Where a stream is read at several points, each weighs the same. Groups of which nothing was seen are selected by
    importance.

    Reference: Berisha, Mehnert and Condurache 2025 (Variance-Based Pruning, arXiv 2507.12988), there for units of MLPs.
    """

    mixes = False  # of the class, not a hyper-parameter
    needs_moments = True

    def _score(self, moments: Moments) -> Tensor:
        """How much each channel matters (n,)."""
        return moments.overall[1].diagonal()

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        moments = problem.moments
        if moments is None:
            return Select()(problem)
        mean = moments.overall[0]
        kept = most_important(self._score(moments), problem.size)
        reduction = selection_map(kept, len(mean))
        return replace(reduction, shift=mean - reduction.unmerge @ mean[kept])


@dataclass(frozen=True)
class Flap(VarianceBased):
    r"""The same, but a channel counts as much as what its readers make of how it varies.

        score_j = C_jj sum over the readers of || W_j ||^2

    The authors' weighted input feature variance and their bias compensation. How many channels each layer keeps is up
    to the budget here; they compare standardised scores over all layers.

    Reference: An, Zhao, Yu, Tang and Wang 2024 (FLAP, arXiv 2312.11983), for heads and hidden units of language models.
    """

    def _score(self, moments: Moments) -> Tensor:
        return moments.overall[1].diagonal() * moments.reader.diagonal()
