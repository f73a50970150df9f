"""Grouped products, as the experts of language models compute them, against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion.network.grouped import multiply_in_groups


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 0], [0, 5, 5], [1, 2, 4]])
def test_each_row_meets_the_matrix_of_its_stretch(ends: list[int]) -> None:
    rows, matrices = torch.randn(5, 4), torch.randn(3, 4, 2)
    owner = [next((i for i, end in enumerate(ends) if k < end), None) for k in range(5)]
    expected = torch.stack([torch.zeros(2) if i is None else r @ matrices[i] for r, i in zip(rows, owner, strict=True)])
    torch.testing.assert_close(multiply_in_groups(rows, matrices, torch.tensor(ends, dtype=torch.int32)), expected)


class Experts(nn.Module):
    """Each token goes to one of four experts, all computed in one grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        ids, order = self.gate(x).argmax(-1).sort()
        ends = torch.bincount(ids, minlength=4).cumsum(0).to(torch.int32)
        h = torch.nn.functional.grouped_mm(x[order], self.up, offs=ends).relu()
        return self.head(torch.nn.functional.grouped_mm(h, self.down, offs=ends)[order.argsort()])


def test_experts_lose_the_same_hidden_channels() -> None:
    """Half of the hidden channels of every expert are never read: without them, nothing changes."""
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(32, 5)
    with torch.no_grad():
        model.down[:, ::2] = 0
    small = intrafusion.compress(model, x, keep={"up": 0.5, "*": 1.0}, restore=None)
    assert small.model.up.shape == (4, 8, 8)
    assert small.model.down.shape == (4, 8, 8)
    torch.testing.assert_close(small.model(x), model(x))


def test_widths_that_the_product_refuses_are_left_alone() -> None:
    """Its rows must be multiples of 16 bytes."""
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(32, 5)
    small = intrafusion.compress(model, x, keep={"up": 0.4, "*": 1.0}, exclude=["stem"], restore=None)
    assert "multiple of 16 bytes" in str(small.rolled_back)
    assert small.model.up.shape == (4, 8, 16)
