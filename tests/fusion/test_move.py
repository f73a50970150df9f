"""Channels moved from where they lie in one tensor to where they lie in another, by hand."""

from __future__ import annotations

import numpy as np
import torch

from intrafusion.fusion.move import Move, move_channels
from intrafusion.graph import Member, Role, Slice

CONSUMES, VARIANCE = frozenset([Role.CONSUMES]), frozenset([Role.VARIANCE])


def member(
    positions: list[int], dim: int = 1, within: Slice | None = None, roles: frozenset[Role] = CONSUMES
) -> Member:
    return Member("a.weight", dim, np.array(positions)[:, None], roles, within)


def test_what_no_move_runs_through_keeps_its_order() -> None:
    tensor, matrix = torch.arange(10.0).reshape(2, 5), torch.tensor([[0.5, 0.5], [0.0, 2.0], [1.0, 0.0]])
    found = move_channels(tensor, [Move(member([3, 1]), member([0, 1, 4]), matrix)], (2, 6))
    rest = tensor[:, [0, 2, 4]]
    moved = tensor[:, [3, 1]] @ matrix.T
    expected = torch.stack([moved[:, 0], moved[:, 1], rest[:, 0], rest[:, 1], moved[:, 2], rest[:, 2]], dim=1)
    torch.testing.assert_close(found, expected)


def test_slices_are_moved_each_on_its_own_and_what_lies_between_stays() -> None:
    tensor = torch.randn(6, 2, dtype=torch.float64)
    swap, first, last = torch.eye(2, dtype=torch.float64).flip(0), Slice(0, 0, 2), Slice(0, 4, 6)
    moves = [
        Move(member([0, 1], within=first), member([0, 1], within=first), swap),
        Move(member([0, 1], within=last), member([0, 1], within=last), 3 * swap),
    ]
    found = move_channels(tensor, moves, (6, 2))
    torch.testing.assert_close(found, torch.cat([tensor[:2].flip(1), tensor[2:4], 3 * tensor[4:].flip(1)]))


def test_variances_are_moved_as_deviations() -> None:
    place = member([0, 1], dim=0, roles=VARIANCE)
    found = move_channels(torch.tensor([4.0, 16.0]), [Move(place, member([0], 0), torch.tensor([[0.5, 0.5]]))], (1,))
    torch.testing.assert_close(found, torch.tensor([9.0]))
