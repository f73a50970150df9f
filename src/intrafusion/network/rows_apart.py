"""Whether a network answers each row of a batch by itself, so that batches may be cut, and images be kept apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.network.batches import cast_like, count_images, pick_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state

_SAME, _ROUNDINGS = 1e-3, 16  # of the size of the outputs: what other shapes of a batch may change by rounding


def is_row_by_row(model: nn.Module, images: Inputs) -> bool:
    """Whether the answers to some of the images are the same where others stand beside them.

    Not so where the first dimension is time, or the nodes of a graph, or where the batch itself is normalised.
    """
    count = count_images(images)
    some = torch.arange(1, count, 2)
    try:
        with preserve_state(model):
            whole = cast_like(images, model).call(model)
            part = cast_like(pick_images(images, some), model).call(model)
    except ModelError:
        return False
    whole, part = ([t for t in found if t.dim()] for found in (whole, part))  # a loss has no rows
    alike = all(_is_picked(a, b, some, count) for a, b in zip(whole, part, strict=False))
    return 0 < len(whole) == len(part) and alike


def _is_picked(whole: Tensor, part: Tensor, places: Tensor, count: int) -> bool:
    if len(whole) != count or part.shape != (len(places), *whole.shape[1:]):
        return False
    wanted = whole[places.to(whole.device)]
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return True  # numbers picked or counted: a tie may fall either way
    size = float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if wanted.numel() else 0.0
    share = max(_SAME, _ROUNDINGS * torch.finfo(wanted.dtype).eps)
    return torch.allclose(part, wanted, rtol=0, atol=share * size + 1e-12, equal_nan=True)
