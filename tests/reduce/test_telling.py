"""The unmerge against regression."""

from __future__ import annotations

import numpy as np
import torch

from intrafusion.reduce.telling import least_squares_map


def test_least_squares_map_is_the_regression_on_samples() -> None:
    rows = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    kept = torch.tensor([1, 4, 5])
    found = least_squares_map(rows.mean(0), torch.cov(rows.T, correction=0), kept, strength=0.0)
    assert found.shift is not None
    design = np.concatenate([rows[:, kept].numpy(), np.ones((500, 1))], axis=1)
    expected = np.linalg.lstsq(design, rows.numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.unmerge.numpy(), expected[:3].T, atol=1e-8)
    np.testing.assert_allclose(found.shift.numpy(), expected[3], atol=1e-8)
    assert torch.equal(found.merge, torch.eye(6, dtype=torch.float64)[kept])


def test_what_is_kept_is_read_as_it_is_however_strong_the_ridge() -> None:
    rows = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    kept, others = torch.tensor([1, 4, 5]), [0, 2, 3]
    c = torch.cov(rows.T, correction=0)
    found = least_squares_map(rows.mean(0), c, kept, strength=0.5)
    assert torch.equal(found.unmerge[kept], torch.eye(3, dtype=torch.float64))
    inner = c[kept][:, kept] + 0.5 * c.diagonal()[kept].mean() * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.unmerge[others], c[others][:, kept] @ inner.inverse())
