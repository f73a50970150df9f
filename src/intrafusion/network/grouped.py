"""Products of rows with one matrix for each stretch of them, as experts compute them, taken apart into plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NAMES = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def is_grouped_product(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation is (rows (k, d), matrices (e, d, c), where each stretch of rows ends (e,)) -> (k, c)."""
    return func.name() in _NAMES and len(args) >= 3 and args[0].dim() == 2 and args[1].dim() == 3


def multiply_in_groups(rows: Tensor, matrices: Tensor, ends: Tensor, *_: Any) -> Tensor:
    """The same stretch by stretch, for any dtype; rows behind the last one are zero, and no rows take no matrix."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    parts = [rows[a:b] @ matrices[i] for i, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a]
    rest = len(rows) - (stops[-1] if stops else 0)
    return torch.cat([*parts, rows.new_zeros(rest, matrices.shape[2])] if rest or not parts else parts)
