"""Reducers that keep some channels and let the consumers read the others off them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.errors import RecipeError
from intrafusion.network.gram import find_scale
from intrafusion.reduce.principal import list_losses, principal_map
from intrafusion.reduce.problem import Moments, ReductionMap, ReductionProblem
from intrafusion.reduce.rotation import list_rotation_losses, rotation_map
from intrafusion.reduce.select import Select, pick_rows, selection_map


@dataclass(frozen=True)
class Telling(ABC):
    """Keep some channels, and let the consumers read the others off them; how they are chosen is up to the subclass.

    Where nothing but linear maps lies between the channels and what reads them (queries and keys, values and the layer
    behind it, linear bottlenecks), the best directions are kept instead, see `principal_map`. So they are of streams
    that norms see, as far as a rotation reaches, see `rotation_map`.

    Works on what the consumers read of the channels (`ReductionProblem.moments`) and ignores importance. Groups for
    which that is unknown, such as those that only grouped convolutions read, are selected by importance.

    Attributes:
        strength: of the ridge of the unmerge, as a fraction of the channels' mean variance.
        unmerge: mix the consumers' columns; False only selects.
        rotate: keep directions of streams; False selects channels of them.
    """

    strength: float = 1e-3
    unmerge: bool = True
    rotate: bool = True

    needs_moments = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise RecipeError(f"strength: expected a number >= 0, got {self.strength!r}.")

    @property
    def mixes(self) -> bool:
        return self.unmerge

    @property
    def rotates(self) -> bool:
        return self.unmerge and self.rotate

    def selecting(self) -> Self:
        return replace(self, unmerge=False)

    @abstractmethod
    def choose(self, moments: Moments, m: int) -> Tensor:
        """The m channels that are kept, ascending."""

    @abstractmethod
    def list_choice_losses(self, moments: Moments) -> Tensor:
        """The share of the consumers' signal that is lost with k chosen channels, for k = 0..n; float64."""

    def tell(self, moments: Moments, kept: Tensor) -> ReductionMap:
        """The map with which consumers read the other channels off those that are kept."""
        return least_squares_map(*moments.overall, kept, self.strength)

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        moments = problem.moments
        if moments is None or problem.size == len(problem.importance):
            return Select()(problem)
        if problem.rotation is not None and self.rotates and moments.bare is not None:
            return rotation_map(moments.bare, problem.size, centred=problem.rotation.centred)
        if problem.linear and self.unmerge:
            return principal_map(moments, problem.size)
        kept = self.choose(moments, problem.size)
        if self.unmerge:
            return self.tell(moments, kept)
        mean = moments.overall[0]
        reduction = selection_map(kept.to(mean.device), len(mean))
        return replace(reduction, shift=mean - reduction.unmerge @ mean[kept])

    def list_losses(self, problem: ReductionProblem) -> Tensor | None:
        """The share of the consumers' signal that is lost with k channels, or directions, for k = 0..n; float64.

        None where nothing is known of what they read.
        """
        moments = problem.moments
        if moments is None:
            return None
        if problem.rotation is not None and self.rotates and moments.bare is not None:
            return list_rotation_losses(moments.bare, centred=problem.rotation.centred)
        return list_losses(moments) if problem.linear else self.list_choice_losses(moments)


def least_squares_map(mean: Tensor, covariance: Tensor, kept: Tensor, strength: float = 1e-3) -> ReductionMap:
    r"""Keep some channels and tell the others from them.

    M = S, the kept rows of the identity;  U = C_:S (C_SS + lam I)^-1 for the others, and of those that are kept
    themselves the identity;  s = mu - U mu_S,  lam = strength * mean C_jj

    Args:
        mean: mu (n,) of what the consumers read.
        covariance: C (n, n) of it.
        kept: (m,) channels.
    Returns:
        the map, float64, with the shift s: without it the consumers' sum misses W_c s.
    """
    unit, kept = find_scale(covariance), kept.to(covariance.device)  # the map knows no unit
    mean, rows, merge = mean.double(), covariance[kept].double() / unit, pick_rows(kept, len(mean))
    others = (merge.sum(0) == 0).nonzero()[:, 0]
    inner = rows[:, kept]
    inner.diagonal().add_((strength * inner.diagonal().mean()).clamp(min=1e-30))
    unmerge = merge.T.contiguous()
    unmerge[others] = torch.linalg.solve(inner, rows[:, others]).T
    return ReductionMap(merge, unmerge, mean - unmerge @ mean[kept])
