"""Products of matrices in parts are those of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intrafusion.network import gram


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("wide", [1, 3, 4, 100])
def test_parts_give_what_the_whole_gives(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "WIDE", wide)
    x, q = rows(10, 4), rows(10, 10, seed=1)
    c, q = torch.stack([q @ q.T, x @ x.T]), q + q.T
    torch.testing.assert_close(gram.square_rows(x.T), x @ x.T)
    torch.testing.assert_close(gram.square_transposed(x), x @ x.T)
    torch.testing.assert_close(gram.multiply_between(c, q), c @ q @ c)
    halved = gram.divide(c, 2.0, torch.float32)
    assert halved.dtype is torch.float32
    assert torch.equal(halved, (c / 2).float())
    assert torch.equal(gram.divide(q, 2.0, torch.float64), q / 2)


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_rows_are_summed_in_float64(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "CHUNK", chunk)
    x = rows(50, 5).float()
    found = gram.square_rows(x)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, x.double().T @ x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "scale"), [([3.0, -5.0], 8.0), ([-4.0, 1.0], 8.0), ([0.0], 1.0), ([], 1.0), ([math.nan, 2.0], 1.0)]
)
def test_scale_is_the_power_of_two_above(x: list[float], scale: float) -> None:
    assert gram.find_scale(torch.tensor(x)) == scale
    assert gram.find_scale(torch.tensor([*x, -math.inf])) == 1.0
