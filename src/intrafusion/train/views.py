"""Images in other views of themselves: mirrored, shifted, mixed with each other. What they show stays plausible."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intrafusion.network.inputs import Inputs

_SHIFT = 8  # by up to one pixel in so many


def find_plain_images(call: Inputs) -> Tensor | None:
    """The images (n, c, h, w) of a call that takes nothing else; None where it takes anything else.

    >>> find_plain_images(Inputs.of(torch.zeros(2, 3))) is None
    True
    """
    tensors = call.tensors()
    plain = len(tensors) == 1 and not call.turned and call.weights is None
    return tensors[0] if plain and tensors[0].dim() == 4 and tensors[0].is_floating_point() else None


def draw_view(images: Tensor) -> Tensor:
    """Each image mirrored or not, shifted, and mixed with another one, by PyTorch's random numbers.

    Args:
        images: (n, c, h, w).
    """
    mirrored = torch.where(_draw(len(images), images) < 0.5, images.flip(-1), images)
    shifted = shift_images(mirrored)
    share = _draw(len(images), images)
    return share * shifted + (1 - share) * shifted[torch.randperm(len(images)).to(images.device)]


def _draw(count: int, like: Tensor) -> Tensor:
    """A number in [0, 1) for each image."""
    return torch.rand(count, 1, 1, 1).to(like)


def shift_images(images: Tensor) -> Tensor:
    """Each image moved by up to an eighth of its size along both sides; what comes in is what lies at the edge."""
    height, width = images.shape[-2:]
    up, left = height // _SHIFT, width // _SHIFT
    wide = F.pad(images.float(), (left, left, up, up), mode="replicate").to(images)
    rows = torch.randint(0, 2 * up + 1, (len(images), 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * left + 1, (len(images), 1)) + torch.arange(width)
    rows, columns = rows.to(images.device), columns.to(images.device)
    every = torch.arange(len(images), device=images.device)[:, None, None]
    moved = wide.movedim(1, -1)[every, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)
