from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import cdist

from intrafusion.transport import cosine_cost, direction_cost, unit_rows


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_cost_equals_scipy_on_unit_rows(rows, p):
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    metric = {"metric": "chebyshev"} if math.isinf(p) else {"metric": "minkowski", "p": p}
    expected = torch.from_numpy(cdist(unit, unit[:3], **metric))
    torch.testing.assert_close(direction_cost(rows, rows[:3], p=p), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [(2, 3, 4), (7, 7, 5), (8, 64, 2048)])
def test_many_differences_are_summed_in_float32(rows, tile, monkeypatch):
    expected = direction_cost(rows, rows[:4])
    monkeypatch.setattr("intrafusion.transport.cost._LARGE", 1)
    monkeypatch.setattr("intrafusion.transport.cost._TILE", tile)
    found = direction_cost(rows, rows[:4])
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.max()))


def test_length_does_not_matter(rows):
    lengths = torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(direction_cost(rows * lengths, rows), direction_cost(rows, rows))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_equal_directions_cost_nothing(rows, p):
    assert direction_cost(rows, 4 * rows, p=p).diagonal().tolist() == [0.0] * 7


@pytest.mark.parametrize("length", [1e-300, 1e300])
def test_extreme_lengths_neither_overflow_nor_vanish(rows, length):
    torch.testing.assert_close(unit_rows(rows * length), unit_rows(rows))


def test_a_zero_row_has_no_direction_and_no_nan():
    rows = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert direction_cost(rows, rows).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_low_precision_rows_are_compared_in_float64():
    assert direction_cost(torch.ones(1, 2).half(), torch.ones(1, 2).bfloat16()).dtype == torch.float64


def test_cosine_equals_scipy_and_is_bounded(rows):
    expected = torch.from_numpy(cdist(rows.numpy(), rows[:3].numpy(), metric="cosine"))
    torch.testing.assert_close(cosine_cost(rows, rows[:3]), expected, rtol=1e-12, atol=1e-12)
    assert cosine_cost(rows, -1e200 * rows).diagonal().tolist() == pytest.approx([2.0] * 7, abs=1e-15)
    assert (cosine_cost(rows, rows) >= 0).all()


def test_cosine_of_a_zero_row_is_neither_near_nor_far():
    assert cosine_cost(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0]])).tolist() == [[1.0], [0.0]]


def test_errors():
    with pytest.raises(ValueError, match="differ in length: 2 and 3"):
        cosine_cost(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected 1 <= p <= inf, got 0.5"):
        direction_cost(torch.ones(1, 2), torch.ones(1, 2), p=0.5)
    with pytest.raises(ValueError, match="got nan"):
        direction_cost(torch.ones(1, 2), torch.ones(1, 2), p=math.nan)
    with pytest.raises(ValueError, match="differ in length: 2 and 3"):
        direction_cost(torch.ones(1, 2), torch.ones(1, 3))
