"""One score per channel out of one score per channel and member, by the names of Torch-Pruning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intrafusion.errors import RecipeError, unknown_name


def aggregate(scores: Tensor, reduction: str, normalizer: str | None, member_normalizer: str | None = None) -> Tensor:
    """Reduce scores (members, n) to (n,) and put them on a scale that can be compared between groups.

    Args:
        scores: one row per member, in execution order, finite.
        reduction: "mean", "sum", "max", "prod", "first" or "last" over the members.
        normalizer: "mean", "sum" or "max" divide by it, "standardize" maps to 0..1, "gaussian" to mean 0 and
            deviation 1, "lamp" divides each score by the sum of all that are not smaller; None leaves the scores alone.
            Scores that are all equal stay finite: a zero divisor is not applied.
        member_normalizer: the same for the scores of each member before they are reduced, so that members of another
            scale weigh alike.
    Raises:
        RecipeError: unknown name.
    """
    check_aggregation(reduction, normalizer, member_normalizer)
    scores = scores.double()
    if member_normalizer is not None:
        scores = torch.stack([NORMALIZERS[member_normalizer](own) for own in scores])
    reduced = _MEMBER_REDUCTIONS[reduction](scores)
    return reduced if normalizer is None else NORMALIZERS[normalizer](reduced)


def check_aggregation(reduction: str, *normalizers: str | None) -> None:
    """Raise RecipeError for an unknown name."""
    if reduction not in _MEMBER_REDUCTIONS:
        raise RecipeError(unknown_name("reduction", reduction, _MEMBER_REDUCTIONS))
    for name in normalizers:
        if name is not None and name not in NORMALIZERS:
            raise RecipeError(unknown_name("normalizer", name, NORMALIZERS))


def _divide(scores: Tensor, by: Tensor) -> Tensor:
    return scores / torch.where(by == 0, 1.0, by)


def _standardize(scores: Tensor) -> Tensor:
    return _divide(scores - scores.min(), scores.max() - scores.min())


def _gaussian(scores: Tensor) -> Tensor:
    return _divide(scores - scores.mean(), scores.std(correction=0))


def _lamp(scores: Tensor) -> Tensor:
    """Layer-adaptive magnitude: s_i / sum of s_j over all j that rank at or above i (Lee et al. 2021, section 3)."""
    order = torch.argsort(scores, descending=True, stable=True)
    ranked = scores[order]
    return torch.empty_like(scores).index_copy(0, order, _divide(ranked, ranked.cumsum(0)))


_MEMBER_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(dim=0),
    "sum": lambda scores: scores.sum(dim=0),
    "max": lambda scores: scores.amax(dim=0),
    "prod": lambda scores: scores.prod(dim=0),
    "first": lambda scores: scores[0],
    "last": lambda scores: scores[-1],
}

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: _divide(scores, scores.mean()),
    "sum": lambda scores: _divide(scores, scores.sum()),
    "max": lambda scores: _divide(scores, scores.max()),
    "standardize": _standardize,
    "gaussian": _gaussian,
    "lamp": _lamp,
}
