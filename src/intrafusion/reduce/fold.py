"""Model folding: channels that are alike become their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intrafusion.arguments import Indices, checked
from intrafusion.errors import ArgumentError, RecipeError, show, unknown_name
from intrafusion.reduce.problem import ReductionMap, ReductionProblem
from intrafusion.reduce.targets import k_means
from intrafusion.transport import unit_rows

_FEATURES = ("rows", "directions")


@checked
@dataclass(frozen=True)
class Fold:
    """Cluster the channels by k-means; each cluster becomes one channel, its mean in and its sum out.

    Importance plays no part. Averaging unlike channels makes them vary less: follow with a repair of the statistics,
    "closed_form" without data.

    Attributes:
        features: what is compared: "rows" (producer rows and consumer columns) or "directions" (the same at unit
            length).
        bias: compare biases, norms folded into them, too.
        n_init: starts of k-means, of which the best is taken.
        raw: rows are those of the network as it is, with the scales and shifts of its norms beside them, as in the
            authors' released code; else batch norms are folded into them.
        balanced: every layer weighs alike, see `importance.features.describing_rows`.

    Reference: Wang et al. 2025 (Model Folding).
    """

    features: str = "rows"
    bias: bool = False
    n_init: int = 10
    raw: bool = True
    balanced: bool = False

    mixes = True  # of the class, not a hyper-parameter
    absorbs_duplicates = True

    def __post_init__(self) -> None:
        if self.features not in _FEATURES:
            raise RecipeError(unknown_name("features", self.features, _FEATURES))
        if self.n_init < 1:
            raise RecipeError(f"n_init: expected at least 1 start of k-means, got {self.n_init!r}.")

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        rows = problem.features.double()
        if self.bias and problem.biases is not None:
            rows = torch.cat([rows, problem.biases.to(rows)], dim=1)
        if self.features == "directions":
            rows = unit_rows(rows)
        return cluster_map(k_means(rows, problem.size, seed=problem.seed, n_init=self.n_init))


@checked
def cluster_map(labels: Indices) -> ReductionMap:
    """M = (C^T C)^-1 C^T, U = C, for the membership C_ic = 1 where channel i belongs to cluster c.

    Args:
        labels: (n,) numbers 0..m-1, each at least once.
    Returns:
        means in, sums out, float64.
    Reference: Wang et al. 2025, section 3.
    """
    if sorted(set(labels.tolist())) != list(range(int(labels.max()) + 1 if len(labels) else 1)):
        raise ArgumentError(f"labels: expected numbers 0..m-1, each at least once, got {show(labels.tolist())}.")
    member = torch.nn.functional.one_hot(labels).double()
    return ReductionMap(merge=(member / member.sum(0)).T.contiguous(), unmerge=member)
