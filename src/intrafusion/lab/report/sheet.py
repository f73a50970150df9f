"""Many small images as one picture."""

from __future__ import annotations

import base64
import io
import math

import torch
from torch import Tensor

from intrafusion.errors import ArgumentError

_SHOWN = 64


def contact_sheet(images: Tensor, *, shown: int = _SHOWN, gap: int = 1) -> Tensor:
    """A grid of images, each stretched to the full range of brightness; (height, width, 3) uint8.

    Args:
        images: (n, 1 or 3, h, w), any range of values.
        shown: how many of them at most.
    Raises:
        ArgumentError: they are no images.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ArgumentError(f"images: expected (n, 1 or 3, height, width), got {list(images.shape)}.")
    images = images[:shown].detach().double().cpu().expand(-1, 3, -1, -1)
    low, high = (f(images.flatten(1), 1, keepdim=True).values[..., None, None] for f in (torch.min, torch.max))
    images = ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    across = math.ceil(math.sqrt(len(images)))
    down = math.ceil(len(images) / across)
    height, width = images.shape[2] + gap, images.shape[3] + gap
    sheet = torch.full((down * height - gap, across * width - gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, across)
        sheet[y * height : (y + 1) * height - gap, x * width : (x + 1) * width - gap] = image.permute(1, 2, 0)
    return sheet


def png(sheet: Tensor) -> bytes:
    """A picture (height, width, 3) uint8 as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_address(sheet: Tensor) -> str:
    """A picture (height, width, 3) uint8 as a data: address of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png(sheet)).decode()
