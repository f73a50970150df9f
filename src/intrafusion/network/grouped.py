"""Grouped matrix products, as mixtures of experts use them: each group of rows times a matrix of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_NAMES = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def is_grouped_product(func: Any) -> bool:
    return func.name() in _NAMES


def multiply_groups(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What PyTorch's grouped product gives, by one product after another: for every precision, and step by step.

    Args:
        a: (rows, k), the rows of a group next to each other; (groups, rows, k) where `offs` is None; or (m, k) with the
            groups side by side where `b` is (k, n).
        b: (groups, k, n), or (k, n).
        offs: behind the last row (or column) of each group.
        bias: (groups, n).
    Returns:
        (rows, n); rows behind the last end are zero. (groups, m, n) where neither or both operands have two dimensions.
    """
    ends = [] if offs is None else offs.tolist()
    if offs is None:
        out = a @ b
    elif a.dim() == 2 and b.dim() == 2:
        out = torch.stack([a[:, start:end] @ b[start:end] for start, end in pairwise((0, *ends))])
    elif a.dim() == 2:
        out = _multiply_rows(a, b, ends, bias)
    else:
        out = torch.cat([a[i] @ b[:, start:end] for i, (start, end) in enumerate(pairwise((0, *ends)))], 1)
    return out if out_dtype is None else out.to(out_dtype)


def _multiply_rows(a: Tensor, b: Tensor, ends: Sequence[int], bias: Tensor | None) -> Tensor:
    held = [(i, start, end) for i, (start, end) in enumerate(pairwise((0, *ends))) if start < end]
    parts = [a[start:end] @ b[i] for i, start, end in held]
    parts = parts if bias is None else [part + bias[i] for part, (i, *_) in zip(parts, held, strict=True)]
    left = len(a) - ends[-1]
    return torch.cat([*parts, a.new_zeros(left, b.shape[-1])] if left or not parts else parts)
