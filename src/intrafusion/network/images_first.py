"""Which dimension images, or sequences, run along in a call: the first, or the second, as where time is the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from intrafusion.errors import ModelError
from intrafusion.network.batches import count_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.rows_apart import is_row_by_row


def put_images_first(example: Inputs, model: nn.Module) -> Inputs:
    """The example, turned where the network answers what lies along the second dimension one by one, and not the first.

    So do recurrent layers and transformers of PyTorch without batch_first. It is tried with a second call beside it.
    """
    first = next((t for t in example.tensors() if t.dim()), None)
    if first is None or first.dim() < 2 or not len(first) or not first.shape[1] or _is_apart(example, model):
        return example
    turned = example.turn(_list_turned(example, *first.shape[:2]))
    return turned if _is_apart(turned, model) else example


def _is_apart(example: Inputs, model: nn.Module) -> bool:
    if any(t.is_meta for t in (*example.tensors(), *model.parameters())):
        return True  # there is nothing to be seen
    try:
        return is_row_by_row(model, _put_another_beside(example))
    except ModelError:
        return False


def _list_turned(example: Inputs, length: int, count: int) -> tuple[int | str, ...]:
    """Arguments (length, count, ...); where both are the same, masks of two dimensions are (count, length)."""

    def is_turned(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != count:
            return False
        return len(value) != count or (length == count and (value.dim() > 2 or value.dtype is not torch.bool))

    named = [*enumerate(example.args), *(example.kwargs or {}).items()]
    return tuple(name for name, value in named if is_turned(value))


def _put_another_beside(example: Inputs) -> Inputs:
    """As many images again with other values, at the end."""
    count, other = count_images(example), example.varied()
    pairs = dict(zip(map(id, example.tensors()), other.tensors(), strict=True))

    def extend(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != count:
            return value
        beside = pairs[id(value)]
        return torch.cat([value, beside if value.is_floating_point() or value.dim() < 2 else beside.flip(1)])

    return replace(example, args=tree_map(extend, example.args), kwargs=tree_map(extend, dict(example.kwargs or {})))
