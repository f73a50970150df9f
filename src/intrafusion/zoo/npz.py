"""Data sets in .npz files: encoded images packed end to end, and the MNIST arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from intrafusion.errors import FolderError, unknown_name
from intrafusion.zoo.images import Images, Normalisation, window


def load_packed(
    path: Path, split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None
) -> Images:
    """Read images of one split of a packed file; only these are decoded.

    A split NAME is three arrays: `NAME_image` (bytes of all encoded images end to end), `NAME_offset` (n + 1 positions
    in it) and `NAME_label` (n class numbers). All images of a split have one size.

    Raises:
        FolderError: the file is missing, or is no such file.
        ValueError: no such split, or `start` and `limit` select nothing.
    """
    with _open(path) as file:
        offset = _array(path, file, split, "_offset")
        part = window(len(offset) - 1, start, limit)
        encoded = _array(path, file, split, "_image")
        labels = _array(path, file, split, "_label")[part]
    bounds = offset[part.start : part.stop + 1]
    pixels = [decode(encoded[a:b].tobytes()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return Images(normalisation(np.stack(pixels)), torch.tensor(labels, dtype=torch.int64))


def load_mnist(
    path: Path, split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None
) -> Images:
    """Read grey images of one split: arrays `NAME_x` (n, H, W) uint8 and `NAME_y` (n,).

    Raises:
        FolderError: the file is missing, or is no such file.
        ValueError: no such split, or `start` and `limit` select nothing.
    """
    with _open(path) as file:
        labels = _array(path, file, split, "_y")
        part = window(len(labels), start, limit)
        pixels = _array(path, file, split, "_x")[part]
    return Images(normalisation(pixels), torch.tensor(labels[part], dtype=torch.int64))


def decode(encoded: bytes) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an encoded image (WebP, JPEG, PNG, ...)."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: expected a readable .npz file, got: {error}") from error


def _array(path: Path, file: Mapping[str, np.ndarray], split: str, suffix: str) -> np.ndarray:
    if split + suffix not in file:
        splits = [name.removesuffix(suffix) for name in file if name.endswith(suffix)]
        raise ValueError(f"{path.name}: {unknown_name('split', split, splits)}")
    return file[split + suffix]
