"""Optimal transport plans, exact or entropic, by POT (this file is the only one that imports it)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from intrafusion.arguments import Count, Matrix, Positive, Vector, checked
from intrafusion.errors import ArgumentError, IntrafusionError

_LARGE = 2**22  # pairs beyond which equal masses are assigned


@checked
def optimal_coupling(cost: Matrix, a: Vector, b: Vector, *, max_iterations: Count = 10_000_000) -> Tensor:
    r"""The cheapest way to move mass a to mass b.

    T = argmin <T, C>  subject to  T 1 = a,  T^T 1 = b,  T >= 0.

    Args:
        cost: C (n, m), finite.
        a: (n,) source masses, >= 0.
        b: (m,) target masses, >= 0, with the same sum as a.
        max_iterations: pivots of the network simplex before it gives up.
    Returns:
        T (n, m) float64, at most n + m - 1 entries of it non-zero. Beyond 2^22 pairs, as many sources as targets, all
        of one mass, are assigned one to one, which is as cheap as any plan and found sooner.
    Raises:
        ArgumentError: shapes that do not fit, a cost that is not finite, masses that are negative or differ in sum.
        IntrafusionError: the solver stopped before the optimum.
    Reference: Bonneel et al. 2011 (the solver); Birkhoff 1946, Crouse 2016 (the assignment, by SciPy); Theus et al.
        2024, Algorithm 2.

    >>> optimal_coupling(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.full((2,), 0.5), torch.full((2,), 0.5)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    _check(cost, a, b)
    if cost.numel() > _LARGE and len(a) == len(b) and _are_equal(a, b):
        return _assign(cost, a)
    import ot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the status is checked below
        coupling, log = ot.emd(*(x.double().cpu().numpy() for x in (a, b, cost)), numItermax=max_iterations, log=True)
    if log["warning"] is not None:
        raise IntrafusionError(
            f"optimal transport of {cost.shape[0]} onto {cost.shape[1]} channels stopped before the optimum: "
            f"{log['warning'].strip()} (at most {max_iterations} iterations); raise max_iterations."
        )
    return torch.as_tensor(coupling, dtype=torch.float64, device=cost.device)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    masses = torch.cat([a, b.to(a)])
    return bool(masses.max() - masses.min() <= 1e-12 * masses.max())


def _assign(cost: Tensor, a: Tensor) -> Tensor:
    """The cheapest one-to-one plan."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = (torch.as_tensor(x) for x in linear_sum_assignment(cost.double().cpu().numpy()))
    coupling = torch.zeros(cost.shape, dtype=torch.float64, device=cost.device)
    coupling[rows, columns] = a.double().to(cost.device)
    return coupling


@checked
def entropic_coupling(
    cost: Matrix,
    a: Vector,
    b: Vector,
    *,
    epsilon: float = 0.01,
    max_iterations: Count = 10_000,
    tolerance: Positive = 1e-3,
) -> Tensor:
    r"""A nearly cheapest way to move mass a to mass b, for groups of thousands of channels.

    T = argmin <T, C> - epsilon <C>_mean H(T)  subject to  T 1 = a,  T^T 1 = b, by Sinkhorn's iteration on logarithms;
    what is left of its error is then moved where it belongs, so that the sums hold exactly.

    It costs O(n m) an iteration, on the device of the cost, while the exact solver runs on one core of the CPU. A
    smaller epsilon is nearer to the exact plan and takes more iterations.

    Args:
        cost: C (n, m), finite.
        a: (n,) source masses, >= 0.
        b: (m,) target masses, >= 0, with the same sum as a.
        epsilon: weight of the entropy as a fraction of the mean cost, > 0.
        max_iterations: before it gives up.
        tolerance: it has converged when the sums are off by less, as a fraction of b, both in l2 norm.
    Returns:
        T (n, m) float64, dense.
    Raises:
        ArgumentError: as `optimal_coupling`, or epsilon <= 0.
        IntrafusionError: no convergence.
    Reference: Cuturi 2013; Schmitzer 2019 (logarithms); Altschuler et al. 2017, Algorithm 2 (exact sums).
    """
    _check(cost, a, b)
    if not epsilon > 0:
        raise ArgumentError(
            f"epsilon: expected a number > 0, got {epsilon!r}; for an exact plan take the exact solver."
        )
    import ot

    cost, a, b = (x.double() for x in (cost, a.to(cost.device), b.to(cost.device)))
    total = a.sum()
    rows, columns = a > 0, b > 0
    inner = cost[rows][:, columns]
    strength = epsilon * float(inner.mean().clamp(min=1e-300))
    size = float(torch.linalg.vector_norm(b) / total)
    options: dict[str, Any] = {"numItermax": max_iterations, "stopThr": tolerance * size, "log": True, "warn": False}
    found, log = ot.bregman.sinkhorn_log(a[rows] / total, b[columns] / total, inner, strength, **options)
    error = float(log["err"][-1]) / size if log["err"] else float("inf")
    if not error < tolerance:
        raise IntrafusionError(
            f"entropic transport of {cost.shape[0]} onto {cost.shape[1]} channels did not converge: after "
            f"{max_iterations} iterations the sums are off by {error:.2g} of their size (tolerance {tolerance:g}); "
            f"raise epsilon (now {epsilon:g}) or max_iterations, or take the exact solver."
        )
    coupling = torch.zeros_like(cost)
    coupling[rows.nonzero(), columns.nonzero().T] = _round_coupling(found * total, a[rows], b[columns])
    return coupling


def _round_coupling(coupling: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearest plan, up to a factor of 2, whose sums are a and b; Altschuler et al. 2017, Algorithm 2."""
    coupling = coupling * (a / coupling.sum(1).clamp(min=1e-300)).clamp(max=1)[:, None]
    coupling = coupling * (b / coupling.sum(0).clamp(min=1e-300)).clamp(max=1)
    rows, columns = (a - coupling.sum(1)).clamp(min=0), (b - coupling.sum(0)).clamp(min=0)
    return coupling + torch.outer(rows, columns) / rows.sum().clamp(min=1e-300)


def _check(cost: Tensor, a: Tensor, b: Tensor) -> None:
    if cost.dim() != 2 or a.shape != cost.shape[:1] or b.shape != cost.shape[1:]:
        raise ArgumentError(
            f"expected cost (n, m), a (n,), b (m,); got {tuple(cost.shape)}, {tuple(a.shape)}, {tuple(b.shape)}."
        )
    if not bool(torch.isfinite(cost).all()):
        raise ArgumentError("cost: expected finite distances, got NaN or infinity; are all weights finite?")
    for name, mass in (("a", a), ("b", b)):
        if not bool((mass >= 0).all() and torch.isfinite(mass).all()):
            raise ArgumentError(
                f"{name}: expected finite masses >= 0, got {mass.min().item():.4g} to {mass.max().item():.4g}."
            )
    if not torch.isclose(a.double().sum(), b.double().sum(), rtol=1e-9, atol=0.0):
        raise ArgumentError(f"expected a and b to carry the same mass, got {a.sum().item()} and {b.sum().item()}.")
