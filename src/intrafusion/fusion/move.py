"""A tensor of one network with its channels moved to where another network has them, more or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.graph import Member
from intrafusion.surgery.maps import map_rows, rewrite_along


@dataclass(frozen=True, eq=False)
class Move:
    """The channels of one member, from where they lie in one tensor to where they lie in the other.

    matrix: (channels of the target, channels of the source), float64.
    """

    source: Member
    target: Member
    matrix: Tensor

    __repr__ = show_briefly


def move_channels(tensor: Tensor, moves: Sequence[Move], shape: tuple[int, ...]) -> Tensor:
    """A new tensor with `shape` along every dimension that the moves run through; the rest keeps its order.

    Args:
        moves: of all groups that run through the dimensions in question.
        shape: of the target's tensor; other dimensions of it are not read.
    """

    def rewrite(part: Tensor, dim: int, moves: Sequence[Move]) -> Tensor:
        return _move_along(part, dim, moves, shape[dim])

    name = moves[0].source.tensor if moves else ""
    return rewrite_along(tensor, [(move.source, move) for move in moves], rewrite, name)


def _move_along(tensor: Tensor, dim: int, moves: Sequence[Move], size: int) -> Tensor:
    old = tensor.movedim(dim, 0)
    new = old.new_zeros(size, *old.shape[1:])
    new[_find_free(size, [m.target for m in moves])] = old[_find_free(len(old), [m.source for m in moves])]
    for move in moves:
        rows = old[torch.from_numpy(move.source.positions)]
        flat = map_rows(move.matrix.to(rows), rows.flatten(1), move.source)
        new[torch.from_numpy(move.target.positions)] = flat.reshape(len(flat), *rows.shape[1:])
    return new.movedim(0, dim)


def _find_free(size: int, members: Sequence[Member]) -> Tensor:
    """Indices that none of these members holds, ascending."""
    free = np.ones(size, bool)
    for member in members:
        free[member.positions] = False
    return torch.from_numpy(np.flatnonzero(free))
