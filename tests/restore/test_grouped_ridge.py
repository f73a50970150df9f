"""Many small ridge regressions at once against one after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intrafusion.restore.grouped_ridge import GroupedRidge
from intrafusion.restore.row_ridge import set_up_ridge

G, K, D, C = 4, 60, 5, 3


def rows(k: int = K, precision: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(G, k, D, dtype=precision) * torch.arange(1, G + 1)[:, None, None] + 2
    return x, torch.randn(k, G * C, dtype=precision) * 2 + 1


def one_by_one(x: Tensor, r: Tensor, steps: int, **options: object) -> tuple[Tensor, Tensor]:
    found = []
    for own, wanted in zip(x, r.unflatten(1, (G, C)).unbind(1), strict=True):
        lack = lambda z, rows, r=wanted: r[rows] if z is None else r[rows].relu() - z.relu()  # noqa: E731
        found.append(set_up_ridge(own, **options).solve(lack, steps))  # type: ignore[arg-type]
    changes, shifts = zip(*found, strict=True)
    return torch.cat(changes), torch.cat(shifts)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("k", [K, 4], ids=["many rows", "fewer rows than unknowns"])
def test_each_group_is_solved_as_if_alone(steps: int, intercept: bool, weighed: bool, k: int) -> None:
    x, r = rows(k)
    weights = torch.rand(k, 1, dtype=torch.float64) if weighed else None
    weights = None if weights is None else weights / weights.mean()
    options = {"strength": 0.01, "scarcity": 0.3, "intercept": intercept, "weights": weights}
    lacking = lambda z, own: r[own] if z is None else r[own].relu() - z.relu()  # noqa: E731
    found = GroupedRidge(x, **options).solve(lacking, steps)  # type: ignore[arg-type]
    torch.testing.assert_close(found, one_by_one(x, r, steps, **options), atol=1e-8, rtol=1e-8)


def test_a_group_without_inputs_leaves_the_others_as_they_are() -> None:
    """Without a ridge its own system is singular; so is that of inputs that are all alike: the least change counts."""
    x, r = rows()
    x[1] = 0.0
    x[2] = torch.tensor([1.0, -1.0]).repeat(K // 2)[:, None]
    change, shift = GroupedRidge(x, 0.0).solve(lambda _, own: r[own])
    for g in (0, 2, 3):
        centred, wanted = x[g] - x[g].mean(0), r[:, g * C : (g + 1) * C]
        least = torch.linalg.pinv(centred) @ (wanted - wanted.mean(0))
        torch.testing.assert_close(change[g * C : (g + 1) * C], least.T, atol=1e-7, rtol=1e-7)
    assert not change[C : 2 * C].any()
    torch.testing.assert_close(shift[C : 2 * C], r[:, C : 2 * C].mean(0))


def test_inputs_far_from_zero_lose_no_digits_in_single_precision() -> None:
    x, _ = rows(3000, torch.float32)
    true = torch.randn(G, C, D)
    y = (x @ true.mT).transpose(0, 1).flatten(1)
    change, _ = GroupedRidge(x + 1000, 1e-9).solve(lambda _, own: y[own])
    torch.testing.assert_close(change.float(), true.flatten(0, 1), atol=1e-3, rtol=0)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        GroupedRidge(torch.zeros(2, 0, 3), 1e-3)
