"""A tensor of one network carried into the coordinates and the shape of another's, narrower or wider."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import Member, Role, Slice
from intrafusion.surgery.maps import narrow_to


@dataclass(frozen=True, eq=False)
class Track:
    """The channels of one member, from where they lie in one tensor to where they lie in the other.

    matrix: (channels of the target, channels of the source), float64.
    """

    source: Member
    target: Member
    matrix: Tensor


def carried(tensor: Tensor, tracks: Sequence[Track], shape: tuple[int, ...]) -> Tensor:
    """A new tensor with `shape` along every dimension that the tracks run through; the rest keeps its order.

    Args:
        tracks: of all groups that run through the dimensions in question.
        shape: of the target's tensor; other dimensions of it are not read.
    """
    whole: dict[int, list[Track]] = defaultdict(list)
    sliced: dict[int, dict[Slice, list[Track]]] = defaultdict(lambda: defaultdict(list))
    for track in tracks:
        if track.source.within is None:
            whole[track.source.dim].append(track)
        else:
            sliced[track.source.dim][track.source.within].append(track)
    for dim, parts in sliced.items():
        tensor = slice_by_slice(tensor, dim, parts, shape[dim])
    for dim, own in whole.items():
        tensor = along(tensor, dim, own, shape[dim])
    return tensor


def slice_by_slice(tensor: Tensor, dim: int, parts: dict[Slice, list[Track]], size: int) -> Tensor:
    """Each slice of a grouped convolution on its own; they still lie as in the source along the other dimension."""
    across = next(iter(parts)).dim
    pieces, end = [], 0
    for within in sorted(parts, key=lambda s: s.start):
        pieces += [tensor.narrow(across, end, within.start - end)] if within.start > end else []
        pieces.append(along(narrow_to(tensor, within), dim, parts[within], size))
        end = within.stop
    if end < tensor.shape[across]:
        pieces.append(tensor.narrow(across, end, tensor.shape[across] - end))
    return torch.cat(pieces, across)


def along(tensor: Tensor, dim: int, tracks: Sequence[Track], size: int) -> Tensor:
    old = tensor.movedim(dim, 0)
    new = old.new_zeros(size, *old.shape[1:])
    new[left(size, [t.target for t in tracks])] = old[left(len(old), [t.source for t in tracks])]
    for track in tracks:
        rows = old[torch.from_numpy(track.source.positions)]
        rows = rows.sqrt() if Role.VARIANCE in track.source.roles else rows
        flat = track.matrix.to(rows) @ rows.flatten(1)
        flat = flat.square() if Role.VARIANCE in track.source.roles else flat
        new[torch.from_numpy(track.target.positions)] = flat.reshape(len(flat), *rows.shape[1:])
    return new.movedim(0, dim)


def left(size: int, members: Sequence[Member]) -> Tensor:
    """Indices that none of these members holds, ascending."""
    free = np.ones(size, bool)
    for member in members:
        free[member.positions] = False
    return torch.from_numpy(np.flatnonzero(free))
