"""The exact optimal transport plan, by the network simplex of POT (this file is the only one that imports it)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from intrafusion.errors import IntrafusionError


def optimal_coupling(cost: Tensor, a: Tensor, b: Tensor, *, max_iterations: int = 10_000_000) -> Tensor:
    r"""The cheapest way to move mass a to mass b.

    T = argmin <T, C>  subject to  T 1 = a,  T^T 1 = b,  T >= 0.

    Args:
        cost: C (n, m), finite.
        a: (n,) source masses, >= 0.
        b: (m,) target masses, >= 0, with the same sum as a.
        max_iterations: pivots of the network simplex before it gives up.
    Returns:
        T (n, m) float64, at most n + m - 1 entries of it non-zero.
    Raises:
        ValueError: shapes that do not fit, a cost that is not finite, masses that are negative or differ in sum.
        IntrafusionError: the solver stopped before the optimum.
    Reference: Bonneel et al. 2011 (the solver); Theus et al. 2024, Algorithm 2.

    >>> optimal_coupling(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.full((2,), 0.5), torch.full((2,), 0.5)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    _check(cost, a, b)
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


def _check(cost: Tensor, a: Tensor, b: Tensor) -> None:
    if cost.dim() != 2 or a.shape != cost.shape[:1] or b.shape != cost.shape[1:]:
        raise ValueError(
            f"expected cost (n, m), a (n,), b (m,); got {tuple(cost.shape)}, {tuple(a.shape)}, {tuple(b.shape)}."
        )
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("cost: expected finite distances, got NaN or infinity; are all weights finite?")
    for name, mass in (("a", a), ("b", b)):
        if not bool((mass >= 0).all()):
            raise ValueError(f"{name}: expected masses >= 0, got {mass.min().item():.4g}.")
    if not torch.isclose(a.double().sum(), b.double().sum(), rtol=1e-9, atol=0.0):
        raise ValueError(f"expected a and b to carry the same mass, got {a.sum().item()} and {b.sum().item()}.")
