"""Image folders as ImageNet's: one subfolder per class, read lazily, resized and cropped as usual for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from intrafusion.arguments import Count, Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, FolderError
from intrafusion.lab.zoo.images import Images, Normalisation, read_rgb

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@checked
@dataclass(frozen=True)
class ImageFolder:
    """Images of a folder, not read before they are asked for.

    Attributes:
        classes: names of the class subfolders, sorted; the class number is the position here.
        files: (path, class number) of each image, by class, then by name.
        resize: the shorter side is scaled to this many pixels, then
        crop: the central square of this many pixels is cut out.
    """

    classes: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]
    normalisation: Normalisation
    resize: int = 256
    crop: int = 224

    __repr__ = show_briefly

    def __len__(self) -> int:
        return len(self.files)

    @checked
    def sample(self, size: Count, *, seed: Seed = 0) -> ImageFolder:
        """A random part of the folder, in random order (all of it if there are fewer than `size` images)."""
        chosen = np.random.RandomState(seed).permutation(len(self))[:size]
        return replace(self, files=tuple(self.files[i] for i in chosen))

    @checked
    def batches(self, size: Count) -> Iterator[Images]:
        """Read, at most `size` images at a time.

        Raises:
            FolderError: a file is no readable image.
        """
        for start in range(0, len(self), size):
            part = self.files[start : start + size]
            pixels = np.stack([read_cropped(path, self.resize, self.crop) for path, _ in part])
            yield Images(self.normalisation(pixels), torch.tensor([label for _, label in part]))


@checked
def open_folder(root: Path, normalisation: Normalisation, *, resize: int = 256, crop: int = 224) -> ImageFolder:
    """List the images below `root`, one subfolder per class.

    Raises:
        FolderError: no class subfolder with an image.
        ArgumentError: `crop` is larger than `resize`.
    """
    if not 1 <= crop <= resize:
        raise ArgumentError(f"expected 1 <= crop <= resize, got crop {crop} and resize {resize}.")
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = tuple(
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _SUFFIXES
    )
    if not files:
        raise FolderError(f"{root}: expected one subfolder per class with {', '.join(_SUFFIXES)} images, found none.")
    return ImageFolder(tuple(folder.name for folder in folders), files, normalisation, resize, crop)


def read_cropped(path: Path, resize: int, crop: int) -> np.ndarray:
    """Pixels (crop, crop, 3) uint8: shorter side scaled to `resize` (bilinear), central square of side `crop`."""
    from PIL import Image

    image = read_rgb(path, str(path))
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))
