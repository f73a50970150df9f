"""Data sets in .npz files: encoded images packed end to end, and the MNIST arrays."""

from __future__ import annotations

import io
import zlib
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from intrafusion.errors import ArgumentError, FolderError, unknown_name
from intrafusion.lab.zoo.images import Images, Normalisation, read_rgb, window

_DAMAGES = (OSError, ValueError, EOFError, BadZipFile, zlib.error, MemoryError, RecursionError, NotImplementedError)
"""What NumPy raises for an array that is damaged, nested in itself, or said to be larger than any memory."""


def load_packed(
    path: Path, split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None
) -> Images:
    """Read images of one split of a packed file; only these are decoded.

    A split NAME is three arrays: `NAME_image` (bytes of all encoded images end to end), `NAME_offset` (n + 1 positions
    in it) and `NAME_label` (n class numbers). All images of a split have one size.

    Raises:
        FolderError: the file is missing, or is no such file.
        ArgumentError: no such split, or `start` and `limit` select nothing.
    """
    with _open(path) as file:
        offset = _array(path, file, split, "_offset")
        part = window(len(offset) - 1, start, limit)
        encoded = _array(path, file, split, "_image")
        labels = _array(path, file, split, "_label")[part]
    bounds = offset[part.start : part.stop + 1]
    pixels = [
        np.asarray(read_rgb(io.BytesIO(encoded[a:b].tobytes()), f"{path}: {split} image at byte {a}"))
        for a, b in pairwise(bounds)
    ]
    if len({image.shape for image in pixels}) > 1 or len(labels) != len(pixels):
        raise FolderError(f"{path}: expected {split} images of one size with one label each; pack the file again.")
    return Images(normalisation(np.stack(pixels)), torch.tensor(labels, dtype=torch.int64))


def load_mnist(
    path: Path, split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None
) -> Images:
    """Read grey images of one split: arrays `NAME_x` (n, H, W) uint8 and `NAME_y` (n,).

    Raises:
        FolderError: the file is missing, or is no such file.
        ArgumentError: no such split, or `start` and `limit` select nothing.
    """
    with _open(path) as file:
        labels = _array(path, file, split, "_y")
        part = window(len(labels), start, limit)
        pixels = _array(path, file, split, "_x")[part]
    return Images(normalisation(pixels), torch.tensor(labels[part], dtype=torch.int64))


def _open(path: Path) -> NpzFile:
    if not is_zipfile(path):
        got = "a damaged or another one" if path.is_file() else "none"
        raise FolderError(f"{path}: expected an .npz file, got {got}; fetch it again.")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise FolderError(f"{path}: expected an .npz file, got a damaged one ({error}); fetch it again.") from error


def _array(path: Path, file: NpzFile, split: str, suffix: str) -> np.ndarray:
    name = split + suffix
    if name not in file:
        splits = [known.removesuffix(suffix) for known in file if known.endswith(suffix)]
        raise ArgumentError(f"{path.name}: {unknown_name('split', split, splits)}")
    try:
        return file[name]
    except _DAMAGES as error:
        raise FolderError(f"{path}: expected a readable array {name}, got: {error}; fetch it again.") from error
