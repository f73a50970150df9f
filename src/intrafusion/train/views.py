"""Images in other views of themselves: mirrored, shifted, cut into and mixed with each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intrafusion.network.inputs import Inputs

_SHIFT = 8  # by up to one pixel in so many
_BOX = 0.8  # the largest side of a box, as a share of the image's


def find_plain_images(call: Inputs) -> Tensor | None:
    """The images (n, c, h, w) of a call that takes nothing else; None where it takes anything else.

    >>> find_plain_images(Inputs.of(torch.zeros(2, 3))) is None
    True
    """
    tensors = call.tensors()
    plain = len(tensors) == 1 and not call.turned and call.weights is None
    return tensors[0] if plain and tensors[0].dim() == 4 and tensors[0].is_floating_point() else None


def draw_view(images: Tensor) -> Tensor:
    """Each image mirrored or not and shifted; into every second a box of another is put; every second is then mixed.

    By PyTorch's random numbers. What they show is the same for a network and one that learns from it, so it need not
    look like anything: Beyer et al. 2022.

    Args:
        images: (n, c, h, w).
    """
    mirrored = torch.where(_draw(images) < 0.5, images.flip(-1), images)
    shifted = shift_images(mirrored)
    cut = torch.where(_draw(images) < 0.5, put_boxes(shifted), shifted)
    return torch.where(_draw(images) < 0.5, mix_images(cut), cut)


def _draw(images: Tensor) -> Tensor:
    """A number in [0, 1) for each image."""
    return torch.rand(len(images), 1, 1, 1).to(images)


def _shuffle(images: Tensor) -> Tensor:
    return images[torch.randperm(len(images)).to(images.device)]


def mix_images(images: Tensor) -> Tensor:
    """Each with another one, in any shares. Reference: Zhang et al. 2018 (mixup)."""
    share = _draw(images)
    return share * images + (1 - share) * _shuffle(images)


def put_boxes(images: Tensor) -> Tensor:
    """Into each a box of another one, with sides up to four fifths of its own. Reference: Yun et al. 2019 (CutMix)."""
    reach = _BOX / 2 * _draw(images).sqrt()
    rows, columns = (_find_near(size, reach, images) for size in images.shape[-2:])
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], _shuffle(images), images)


def _find_near(size: int, reach: Tensor, images: Tensor) -> Tensor:
    """Which of the pixels of a side lie as near as that, as a share of it, to a place for each image, (n, size)."""
    places = (torch.arange(size, device=images.device) + 0.5) / size
    return (places - _draw(images)[:, :, 0, 0]).abs() < reach[:, :, 0, 0]


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
