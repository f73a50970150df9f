"""Label tensors: one integer per element of an activation or a weight, stored broadcast where it does not vary.

A label tensor has the shape of the tensor it describes. Along dimensions where all labels agree its stride is 0, so it
costs no memory there, and `find_varying` reads from the strides which dimensions carry channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

UNIFORM = 0  # a constant, or anything that is the same for all channels
FIXED = 1  # a channel that must stay as it is: unknown, or tied to the input
FIRST = 2  # the first label that names a channel


def find_varying(t: Tensor) -> set[int]:
    """Dimensions along which a label tensor may differ."""
    return {d for d, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)) if size > 1 and stride != 0}


def compact(t: Tensor) -> Tensor:
    """The same labels with stride 0 on every dimension along which they are constant."""
    dims = find_varying(t)
    if not dims:
        return t
    array = narrow(t)
    if len(dims) == 1 and array.size and array.flat[0] != array.flat[-1]:  # as along most layers
        return t
    constant = [d for d in dims if (array == array.take([0], d)).all()]
    if not constant:
        return t
    small = t[tuple(slice(0, 1) if d in constant else slice(None) for d in range(t.dim()))]
    return small.expand(t.shape)


def narrow(t: Tensor) -> np.ndarray:
    """The labels as an array, of size 1 along every dimension that does not vary."""
    keep = find_varying(t)
    return t.numpy()[(*(slice(None) if d in keep else slice(0, 1) for d in range(t.dim())), ...)]


def fill(value: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A label tensor with one label everywhere."""
    return torch.full((1,) * len(shape), value).expand(shape)


def _as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of an array that may be a read-only view."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # which would make one dimension of none
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def widen(array: np.ndarray, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Back from `narrow`: a label tensor of the given shape."""
    return compact(_as_tensor(array).expand(shape))


def count_earlier(array: np.ndarray, dim: int) -> np.ndarray:
    """How many equal elements precede each element along a dimension."""
    moved = np.moveaxis(array, dim, -1)
    rows = moved.reshape(-1, array.shape[dim])
    if (rows[:, 1:] > rows[:, :-1]).all():  # no two are equal, as most often
        return np.zeros(array.shape, np.int64)
    flat = (np.arange(len(rows))[:, None] << 32 | rows).ravel()
    order = np.argsort(flat, kind="stable")
    starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
    rank = np.empty(len(flat), np.int64)
    rank[order] = np.arange(len(flat)) - np.repeat(starts, np.diff(np.append(starts, len(flat))))
    return np.moveaxis(rank.reshape(moved.shape), -1, dim)


def lay_along(array: np.ndarray, dim: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """One label per index of one dimension, the same everywhere else."""
    view = [1] * len(shape)
    view[dim] = -1
    return compact(_as_tensor(array).view(view)).expand(shape)


def pair_up(a: Tensor, b: Tensor, a_min: int = FIRST, b_min: int = FIRST) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs (a, b) of two label tensors of one shape, with a >= a_min and b >= b_min."""
    x, y = np.broadcast_arrays(narrow(a), narrow(b))
    x, y = x.ravel(), y.ravel()
    keep = (x >= a_min) & (y >= b_min)
    x, y = x[keep], y[keep]
    if len(find_varying(a) | find_varying(b)) > 1 and len(x) > 1:
        code = np.unique(x.astype(np.int64) << 32 | y)
        x, y = code >> 32, code & 0xFFFFFFFF
    return x, y
