"""Labelled images in memory, and how raw pixels become the numbers a network expects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from intrafusion.arguments import Batch, Count, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, FolderError, show

if TYPE_CHECKING:
    from PIL import Image


@checked
@dataclass(frozen=True, eq=False)
class Images:
    """Normalised images (n, C, H, W) float32 and their class numbers (n,) int64.

    Raises:
        ArgumentError: the numbers of images and labels differ.
    """

    images: Batch
    labels: Batch

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ArgumentError(
                f"Images: expected one label per image, got {len(self.images)} images, {len(self.labels)} labels; "
                "give as many of both."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @checked
    def batches(self, size: Count) -> Iterator[Images]:
        """Consecutive parts of at most `size` images."""
        return map(Images, self.images.split(size), self.labels.split(size))


@checked
@dataclass(frozen=True)
class Normalisation:
    """Pixels to network input: (pixel / white - mean) / std, per colour channel.

    Attributes:
        white: the pixel value that counts as 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 255.0

    @checked
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Normalise (n, H, W, C), or grey (n, H, W), pixels to a float32 tensor (n, C, H, W)."""
        if pixels.ndim not in (3, 4) or pixels.dtype == object:
            raise ArgumentError(
                f"Normalisation: expected pixels (n, H, W, C), or grey (n, H, W), got {show(pixels)}; "
                "pixels[None] makes one image a batch."
            )
        pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        images = torch.tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), dtype=torch.float32)
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.div_(self.white).sub_(mean).div_(std)


def window(count: int, start: int, limit: int | None) -> slice:
    """The slice of `limit` items (all that are left if None, or if fewer are left) from `start` on.

    Raises:
        ArgumentError: `start` is not one of the `count` items, or `limit` is below 1.
    """
    if not 0 <= start < count:
        raise ArgumentError(f"expected a start in 0..{count - 1}, got {start}.")
    if limit is not None and limit < 1:
        raise ArgumentError(f"expected a limit of at least 1 image (None for all), got {limit}.")
    return slice(start, count if limit is None else min(start + limit, count))


def read_rgb(source: Path | BinaryIO, where: str) -> Image.Image:
    """Decode an image (WebP, JPEG, PNG, ...) to 8-bit red, green and blue.

    Raises:
        FolderError: it is no readable image; `where` begins the message.
    """
    from PIL import Image

    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # all that Pillow raises on damage
        raise FolderError(f"{where}: expected a readable image, got: {error}; remove or replace it.") from error
