"""The ridge regression against numpy's least squares on the augmented system."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from intrafusion.restore.ridge import ridge


def rows(k: int = 50, d: int = 6, c: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(k, d, dtype=torch.float64) * torch.arange(1, d + 1) + 2
    return x, torch.randn(k, c, dtype=torch.float64) + 5


def augmented(x: np.ndarray, r: np.ndarray, lam: float) -> np.ndarray:
    """min |R - X D^T|^2 / k + lam |D|^2 as one plain least-squares problem."""
    d = x.shape[1]
    system = np.concatenate([x / np.sqrt(len(x)), np.sqrt(lam) * np.eye(d)])
    right = np.concatenate([r / np.sqrt(len(x)), np.zeros((d, r.shape[1]))])
    return np.linalg.lstsq(system, right, rcond=None)[0].T


@pytest.mark.parametrize("k", [50, 7, 6, 4])  # more and fewer rows than unknowns
@pytest.mark.parametrize("chunk", [50, 3])
def test_with_intercept_it_is_the_ridge_on_centred_rows(k: int, chunk: int) -> None:
    x, r = rows(k)
    change, shift = ridge(zip(x.split(chunk), r.split(chunk), strict=True), 0.1, scarcity=0.5)
    xn, rn = x.numpy(), r.numpy()
    lam = (0.1 + 0.5 * 6 / k) * xn.var(0).mean()
    expected = augmented(xn - xn.mean(0), rn - rn.mean(0), lam)
    np.testing.assert_allclose(change.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(shift.numpy(), rn.mean(0) - expected @ xn.mean(0), atol=1e-10)


@pytest.mark.parametrize("k", [50, 4])
def test_without_intercept_it_goes_through_the_origin(k: int) -> None:
    x, r = rows(k)
    change, shift = ridge([(x, r)], 0.1, intercept=False)
    expected = augmented(x.numpy(), r.numpy(), 0.1 * float(x.square().mean()))
    np.testing.assert_allclose(change.numpy(), expected, atol=1e-10)
    assert not shift.any()


def test_no_ridge_is_plain_least_squares() -> None:
    x, _ = rows()
    true = torch.randn(3, 6, dtype=torch.float64)
    change, shift = ridge([(x, x @ true.T + 4.0)], 0.0)
    torch.testing.assert_close(change, true, atol=1e-8, rtol=0)
    torch.testing.assert_close(shift, torch.full((3,), 4.0, dtype=torch.float64), atol=1e-7, rtol=0)


def test_fewer_rows_than_unknowns_and_no_ridge_gives_the_smallest_change() -> None:
    x, r = rows(4)
    change, shift = ridge([(x, r)], 0.0)
    expected = np.linalg.pinv((x - x.mean(0)).numpy()) @ (r - r.mean(0)).numpy()
    np.testing.assert_allclose(change.numpy(), expected.T, atol=1e-8)
    np.testing.assert_allclose(x.numpy() @ change.numpy().T + shift.numpy(), r.numpy(), atol=1e-8)


def test_constant_inputs_change_nothing_but_the_shift() -> None:
    change, shift = ridge([(torch.zeros(9, 4), torch.full((9, 2), 3.0))], 1e-3)
    assert not change.any()
    assert shift.tolist() == [3.0, 3.0]


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        ridge([], 1e-3)
