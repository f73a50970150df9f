"""Intra-Fusion: fuse all channels into the most important ones along an optimal transport plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from intrafusion.arguments import Indices, Matrix, Vector, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, RecipeError, show, unknown_name
from intrafusion.reduce.problem import ReductionMap, ReductionProblem
from intrafusion.reduce.select import most_important, selection_map
from intrafusion.reduce.targets import gaussian_mixture, k_means
from intrafusion.transport import (
    MARGINALS,
    cosine_cost,
    direction_cost,
    entropic_coupling,
    marginal,
    optimal_coupling,
)


@checked
@dataclass(frozen=True)
class IntraFusion:
    """Fuse n channels into m along an optimal transport plan between all channels and m targets.

    Attributes:
        normalization: how the plan becomes maps, see `intrafusion_map`: "source", "target" or "function".
        cost: what it costs to move one channel into another: "lp", the distance of order p between their directions,
            or "cosine", 1 - their cosine.
        p: order of that distance.
        source_marginal: mass of the n channels: "uniform", "importance", "softmax" or "radical".
        target_marginal: mass of the m targets, by the same names.
        target: what the channels are fused into: "most_important" channels, or the centres of "kmeans" clusters or of a
            "gaussian_mixture" of all channels, each as important as its channels together.
        bias: compare biases too; the paper says yes, its released code leaves them out.
        solver: "exact" or "entropic" (Sinkhorn; a dense plan, for groups of thousands of channels).
        epsilon: of the entropic solver: weight of the entropy as a fraction of the mean cost.
        n_init: starts of the clustering of centres, of which the best is taken.
        raw, balanced: how channels are described, see `importance.features.describing_rows`; the paper folds norms.

    Reference: Theus et al. 2024, Algorithm 2.
    """

    normalization: str = "source"
    p: float = 1.0
    source_marginal: str = "uniform"
    target_marginal: str = "uniform"
    target: str = "most_important"
    bias: bool = True
    cost: str = "lp"
    solver: str = "exact"
    epsilon: float = 0.01
    n_init: int = 1
    raw: bool = False
    balanced: bool = False

    __repr__ = show_briefly

    mixes = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        _check_name("normalization", self.normalization, NORMALIZATIONS)
        _check_name("source_marginal", self.source_marginal, MARGINALS)
        _check_name("target_marginal", self.target_marginal, MARGINALS)
        _check_name("target", self.target, _TARGETS)
        _check_name("cost", self.cost, _COSTS)
        _check_name("solver", self.solver, _SOLVERS)
        if not self.p >= 1:
            raise RecipeError(f"p: expected 1 <= p <= inf, got {self.p!r}.")
        if not self.epsilon > 0:
            raise RecipeError(f"epsilon: expected a number > 0, got {self.epsilon!r}.")
        if self.n_init < 1:
            raise RecipeError(f"n_init: expected at least 1 start of the clustering, got {self.n_init!r}.")

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        kept = most_important(problem.importance, problem.size)
        if problem.size == len(problem.importance):
            return selection_map(kept, problem.size)
        rows = problem.features
        if self.bias and problem.biases is not None:
            rows = torch.cat([rows, problem.biases.to(rows)], dim=1)
        points, scores = _TARGETS[self.target](rows, problem, kept, self.n_init)
        a = marginal(self.source_marginal, problem.importance, kept)
        b = marginal(self.target_marginal, scores, torch.arange(problem.size, device=kept.device))
        return intrafusion_map(
            rows,
            points,
            a,
            b,
            own=kept if self.target == "most_important" else None,
            normalization=self.normalization,
            p=self.p,
            cost=self.cost,
            solver=self.solver,
            epsilon=self.epsilon,
        )


@checked
def intrafusion_map(
    features: Matrix,
    targets: Matrix,
    a: Vector,
    b: Vector,
    *,
    own: Indices | None = None,
    normalization: str = "source",
    p: float = 1.0,
    cost: str = "lp",
    solver: str = "exact",
    epsilon: float = 0.01,
) -> ReductionMap:
    r"""Fuse n channels into m targets along the optimal transport plan between them.

    T = argmin <T, C>  subject to  T 1 = a,  T^T 1 = b,  with C the cost between the directions of rows, and

        "source":    M = T^T diag(1/a),   U = M^T          (each old channel is shared out whole; the released code)
        "target":    M = diag(1/b) T^T,   U = M^T          (each new channel is a mean; the paper's wording)
        "function":  M = diag(1/b) T^T,   U = diag(1/a) T  (means in, sums out: exact on duplicated channels)

    Args:
        features: (n, d), one row per channel; rows are compared by direction, so their length does not matter.
        targets: (m, d), one row per new channel.
        a: (n,) masses of the channels, > 0, sum 1.
        b: (m,) masses of the targets, > 0, sum 1.
        own: (m,) the channels that the targets are, if they are channels themselves: saves transporting what stays.
        normalization: "source", "target" or "function".
        p: order of the distance.
        cost: "lp" or "cosine".
        solver: "exact" or "entropic".
        epsilon: of the entropic solver.
    Returns:
        merge M (m, n) and unmerge U (n, m), float64.
    Raises:
        ArgumentError: shapes or masses that do not fit, an unknown name, p < 1.
        IntrafusionError: the solver stopped before the optimum, or did not converge.
    Reference: Theus et al. 2024, Algorithm 2.
    """
    _check_name("normalization", normalization, NORMALIZATIONS)
    _check_name("cost", cost, _COSTS)
    _check_name("solver", solver, _SOLVERS)
    _check_fit(features, targets, a, b, own)
    coupling = torch.zeros(len(a), len(b), dtype=torch.float64, device=features.device)
    a_left, b_left = a, b
    if own is not None and cost == "lp" and solver == "exact":
        coupling, a_left, b_left = _keep_mass_in_place(a, b, own)
    rows, columns = (left.nonzero().squeeze(1) for left in (a_left, b_left))
    if len(rows) and len(columns):
        costs = _COSTS[cost](features[rows], targets[columns], p)
        coupling[rows[:, None], columns] += _SOLVERS[solver](costs, a_left[rows], b_left[columns], epsilon)
    return NORMALIZATIONS[normalization](coupling, a, b)


def _check_fit(features: Tensor, targets: Tensor, a: Tensor, b: Tensor, own: Tensor | None) -> None:
    if len(features) != len(a) or len(targets) != len(b):
        raise ArgumentError(
            f"intrafusion_map: expected one mass per row, got {len(features)} and {len(targets)} rows, {len(a)} and "
            f"{len(b)} masses."
        )
    for name, mass in (("a", a), ("b", b)):
        if not bool(((mass > 0) & torch.isfinite(mass)).all()):
            raise ArgumentError(f"{name}: expected finite masses > 0, got others; `marginal` makes such.")
    if own is not None and (len(own) != len(b) or not set(own.tolist()) <= set(range(len(a)))):
        raise ArgumentError(
            f"own: expected the channel that each of the {len(b)} targets is, got {show(own.tolist())}."
        )


def _keep_mass_in_place(a: Tensor, b: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass that a channel and the target that it is have in common stays in place: the cost is a metric.

    Returns:
        that part of the coupling (n, m), and what is left of a and b (exactly 0 where nothing is, equal sums).
    Reference: Villani 2003, section 1.2 (the transport cost of a metric depends on a - b alone).
    """
    stay = torch.minimum(a[own], b)
    coupling = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    coupling[own, torch.arange(len(b), device=a.device)] = stay
    a_left = a.double().clone()
    a_left[own] -= stay
    b_left = b.double() - stay
    total = a_left.sum()
    least = 1e-12 / len(a)
    a_left, b_left = (torch.where(left > least, left, 0.0) for left in (a_left, b_left))
    scale = lambda left: left * (total / left.sum()) if left.sum() > 0 else left  # noqa: E731
    return coupling, scale(a_left), scale(b_left)


def _source(coupling: Tensor, a: Tensor, b: Tensor) -> ReductionMap:
    shares = coupling / a[:, None]
    return ReductionMap(merge=shares.T.contiguous(), unmerge=shares)


def _target(coupling: Tensor, a: Tensor, b: Tensor) -> ReductionMap:
    means = coupling / b
    return ReductionMap(merge=means.T.contiguous(), unmerge=means)


def _function(coupling: Tensor, a: Tensor, b: Tensor) -> ReductionMap:
    return ReductionMap(merge=(coupling / b).T.contiguous(), unmerge=coupling / a[:, None])


def _kept_channels(rows: Tensor, problem: ReductionProblem, kept: Tensor, n_init: int) -> tuple[Tensor, Tensor]:
    return rows[kept], problem.importance[kept]


def _k_means_centres(rows: Tensor, problem: ReductionProblem, kept: Tensor, n_init: int) -> tuple[Tensor, Tensor]:
    member = one_hot(k_means(rows, problem.size, seed=problem.seed, n_init=n_init)).double()
    return member.T @ rows / member.sum(0)[:, None], member.T @ problem.importance


def _mixture_means(rows: Tensor, problem: ReductionProblem, kept: Tensor, n_init: int) -> tuple[Tensor, Tensor]:
    labels, means = gaussian_mixture(rows, problem.size, seed=problem.seed, n_init=n_init)
    return means, one_hot(labels).double().T @ problem.importance


def _check_name(kind: str, name: str, valid: Mapping[str, object]) -> None:
    if name not in valid:
        raise RecipeError(unknown_name(kind, name, valid))


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], ReductionMap]] = {
    "source": _source,
    "target": _target,
    "function": _function,
}

# (rows (n, d), problem, kept (m,), starts) -> the targets' rows (m, d) and their importance (m,)
_TARGETS: dict[str, Callable[[Tensor, ReductionProblem, Tensor, int], tuple[Tensor, Tensor]]] = {
    "most_important": _kept_channels,
    "kmeans": _k_means_centres,
    "gaussian_mixture": _mixture_means,
}

# (rows (n, d), targets (m, d), p) -> (n, m)
_COSTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "lp": lambda x, y, p: direction_cost(x, y, p=p),
    "cosine": lambda x, y, p: cosine_cost(x, y),
}

# (cost (n, m), a (n,), b (m,), epsilon) -> coupling (n, m)
_SOLVERS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "exact": lambda cost, a, b, epsilon: optimal_coupling(cost, a, b),
    "entropic": lambda cost, a, b, epsilon: entropic_coupling(cost, a, b, epsilon=epsilon),
}
