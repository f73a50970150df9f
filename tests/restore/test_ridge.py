"""The ridge regression against numpy's least squares, and behind an activation function against SciPy's minimiser."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from intrafusion.restore.ridge import Rows
from intrafusion.restore.row_ridge import set_up_ridge


def rows(k: int = 50, d: int = 6, c: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(k, d, dtype=torch.float64) * torch.arange(1, d + 1) + 2
    return x, torch.randn(k, c, dtype=torch.float64) + 5


def augmented(x: np.ndarray, r: np.ndarray, lam: float) -> np.ndarray:
    """min |R - X D^T|^2 / k + lam |D|^2 as one plain least-squares problem."""
    d = x.shape[1]
    system = np.concatenate([x / np.sqrt(len(x)), np.sqrt(lam) * np.eye(d)])
    right = np.concatenate([r / np.sqrt(len(x)), np.zeros((d, r.shape[1]))])
    return np.linalg.lstsq(system, right, rcond=None)[0].T


def ridge(x: torch.Tensor, r: torch.Tensor, strength: float, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return set_up_ridge(x, strength, **options).solve(lambda _, own: r[own])  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [50, 7, 6, 4])  # more and fewer rows than unknowns
@pytest.mark.parametrize("part", [1024, 3])
def test_with_intercept_it_is_the_ridge_on_centred_rows(k: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intrafusion.restore.ridge._MOST", part)
    monkeypatch.setattr("intrafusion.restore.ridge.Ridge.fewest", part)
    x, r = rows(k)
    change, shift = ridge(x, r, 0.1, scarcity=0.5)
    xn, rn = x.numpy(), r.numpy()
    lam = (0.1 + 0.5 * 6 / k) * xn.var(0).mean()
    expected = augmented(xn - xn.mean(0), rn - rn.mean(0), lam)
    np.testing.assert_allclose(change.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(shift.numpy(), rn.mean(0) - expected @ xn.mean(0), atol=1e-10)


@pytest.mark.parametrize("k", [50, 4])
def test_without_intercept_it_goes_through_the_origin(k: int) -> None:
    x, r = rows(k)
    change, shift = ridge(x, r, 0.1, intercept=False)
    expected = augmented(x.numpy(), r.numpy(), 0.1 * float(x.square().mean()))
    np.testing.assert_allclose(change.numpy(), expected, atol=1e-10)
    assert not shift.any()


def test_no_ridge_is_plain_least_squares() -> None:
    x, _ = rows()
    true = torch.randn(3, 6, dtype=torch.float64)
    change, shift = ridge(x, x @ true.T + 4.0, 0.0)
    torch.testing.assert_close(change, true, atol=1e-8, rtol=0)
    torch.testing.assert_close(shift, torch.full((3,), 4.0, dtype=torch.float64), atol=1e-7, rtol=0)


def test_fewer_rows_than_unknowns_and_no_ridge_gives_the_smallest_change() -> None:
    x, r = rows(4)
    change, shift = ridge(x, r, 0.0)
    expected = np.linalg.pinv((x - x.mean(0)).numpy()) @ (r - r.mean(0)).numpy()
    np.testing.assert_allclose(change.numpy(), expected.T, atol=1e-8)
    np.testing.assert_allclose(x.numpy() @ change.numpy().T + shift.numpy(), r.numpy(), atol=1e-8)


def test_constant_inputs_change_nothing_but_the_shift() -> None:
    change, shift = ridge(torch.zeros(9, 4), torch.full((9, 2), 3.0), 1e-3)
    assert not change.any()
    assert shift.tolist() == [3.0, 3.0]


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        set_up_ridge(torch.zeros(0, 3), 1e-3)


def test_inputs_far_from_zero_lose_no_digits_in_single_precision() -> None:
    x = torch.randn(500, 4) + 1000
    true = torch.randn(2, 4)
    change, shift = ridge(x, (x - 1000) @ true.T, 1e-9)
    torch.testing.assert_close(change.float(), true, atol=1e-3, rtol=0)
    torch.testing.assert_close((x.double() @ change.T + shift).float(), (x - 1000) @ true.T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("k", [200, 5])  # more and fewer rows than unknowns
@pytest.mark.parametrize(
    ("activation", "integral"),
    [(torch.relu, lambda z: z.clamp(min=0).square() / 2), (torch.sigmoid, torch.nn.functional.softplus)],
    ids=["relu", "sigmoid"],
)
def test_steps_lead_to_the_least_matching_loss(activation, integral, k: int, intercept: bool) -> None:  # type: ignore[no-untyped-def]
    """min over D, e of  mean (F(z) - f(y) z) + lam/2 |D|^2,  z = D x + e + z0,  with F the integral of f."""
    x, base = rows(k, 6, 1)
    y, base = torch.randn(k, 1, dtype=torch.float64) * 2, (base - 5)

    def lacking(given: torch.Tensor | None, own: Rows) -> torch.Tensor:
        return (y - base)[own] if given is None else activation(y[own]) - activation(given + base[own])

    change, shift = set_up_ridge(x, 0.1, intercept=intercept).solve(lacking, 5000)
    centred = x - x.mean(0) if intercept else x
    lam = 0.1 * float(centred.square().mean())

    def loss(parameters: np.ndarray) -> float:
        d, e = torch.tensor(parameters[:6]), parameters[6] * intercept
        z = (centred @ d)[:, None] + e + base
        return float((integral(z) - activation(y) * z).mean() + lam / 2 * d.square().sum())

    found = minimize(loss, np.zeros(7), tol=1e-14).x
    np.testing.assert_allclose(change[0].numpy(), found[:6], atol=2e-4)
    if intercept:
        np.testing.assert_allclose(float(shift + change[0] @ x.mean(0)), found[6], atol=2e-4)


def test_no_step_increases_the_matching_loss() -> None:
    x, base = rows(100, 6, 2)
    x, base, y = x.float(), base.float() - 5, torch.randn(100, 2)
    losses = []
    for steps in range(1, 12):
        lacking = lambda z, own: (y - base)[own] if z is None else y[own].relu() - (z + base[own]).relu()  # noqa: E731
        change, shift = set_up_ridge(x, 1e-6).solve(lacking, steps)
        z = x @ change.T.float() + shift.float() + base
        losses.append(float((z.relu().square() / 2 - y.relu() * z).mean()))
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 1e-3


def test_one_input() -> None:
    x = torch.randn(20, 1, dtype=torch.float64)
    change, shift = set_up_ridge(x, 0.0).solve(lambda _, own: 3 * x[own] + 2)
    torch.testing.assert_close((change, shift), (torch.tensor([[3.0]]).double(), torch.tensor([2.0]).double()))


@pytest.mark.parametrize("k", [200, 5])  # more and fewer rows than unknowns
@pytest.mark.parametrize("weighed", [False, True])
def test_steps_go_on_from_a_change(k: int, weighed: bool) -> None:
    x, base = rows(k, 6, 2)
    y, base = torch.randn(k, 2, dtype=torch.float64), base - 5
    weights = torch.rand(k, 1, dtype=torch.float64) + 0.5 if weighed else None
    lacking = lambda z, own: (y - base)[own] if z is None else y[own].relu() - (z + base[own]).relu()  # noqa: E731
    found = set_up_ridge(x, 0.1, weights=None if weights is None else weights / weights.mean())
    for one, other in zip(found.solve(lacking, 2, start=found.solve(lacking, 3)), found.solve(lacking, 5), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("k", [50, 4])
def test_what_a_change_gives_at_some_rows(k: int) -> None:
    x, r = rows(k)
    found = set_up_ridge(x, 0.1)
    change, shift = found.solve(lambda _, own: r[own])
    some = torch.tensor([3, 0, 2])
    torch.testing.assert_close(found.predict((change, shift), some), x[some] @ change.T + shift)
