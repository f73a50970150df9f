"""Grouped products: one after another they give what PyTorch's own gives, and experts made of them shrink."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion import compress
from intrafusion.network.grouped import multiply_groups

ENDS = [2, 2, 6]  # the second group is empty


@pytest.mark.parametrize(
    ("a", "b", "ends"),
    [
        ((6, 8), (3, 8, 4), ENDS),
        ((4, 8), (8, 4), [4, 4, 8]),
        ((3, 4, 8), (8, 8), [4, 4, 8]),
        ((3, 4, 8), (3, 8, 4), None),
    ],
    ids=["rows", "inner", "columns", "batch"],
)
def test_it_is_the_product_of_pytorch(a: tuple[int, ...], b: tuple[int, ...], ends: list[int] | None) -> None:
    x, y = torch.randn(a), torch.randn(b)
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    expected = F.grouped_mm(x, y, offs=offsets)
    torch.testing.assert_close(multiply_groups(x, y, offsets), expected)


class Experts(nn.Module):
    """Rows in three groups, each with a feed-forward of its own; the widths lie side by side in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 8), nn.Linear(8, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 8)), nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor(ENDS, dtype=torch.int32)
        x = self.enter(x)
        h = F.grouped_mm(x, self.up.mT, offs=ends).relu()
        return self.leave(x + F.grouped_mm(h, self.down.mT, offs=ends))


class Looped(Experts):
    """The same, written as loops."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        rows = zip([0, *ENDS[:-1]], ENDS, range(3), strict=True)
        return self.leave(x + torch.cat([F.relu(x[a:b] @ self.up[i].T) @ self.down[i].T for a, b, i in rows if a < b]))


def test_experts_are_reduced_as_where_they_are_loops() -> None:
    grouped, x = Experts().eval(), torch.randn(6, 5)
    looped = Looped().eval()
    looped.load_state_dict(copy.deepcopy(grouped.state_dict()))
    small, expected = (compress(m, x, 0.5, reducer="select", restore=None).model for m in (grouped, looped))
    assert small.up.shape == (3, 8, 4)
    assert small.down.shape == (3, 4, 8)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor)
    torch.testing.assert_close(small(x), expected(x))


def test_widths_that_the_product_does_not_take_are_left_alone() -> None:
    """It asks for rows of a multiple of 16 bytes."""
    net, x = Experts().eval(), torch.randn(6, 5)
    small = compress(net, x, {"up": 0.35, "enter": 1.0}, reducer="select", restore=None)
    assert small.model.up.shape == (3, 16, 8)
    assert "multiple of 16 bytes" in small.rolled_back["up"]
    small.model(x)
