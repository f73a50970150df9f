"""What networks read, from the command line: example inputs written as shapes, files of images and of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from intrafusion.errors import FolderError, ModelError, show
from intrafusion.io.atomic import read_text
from intrafusion.io.weights import read_torch_file
from intrafusion.network.inputs import Inputs
from intrafusion.restore import load_images

IMAGE_FILES = ".npy, or .npz, .safetensors or .pt with an array `images` (.pt: or a tensor)"
_REMEDY = "save the images alone: torch.save(images, FILE), of a tensor (n, ...)"


def read_inputs(texts: Iterable[str]) -> Inputs:
    """Arguments of one forward call from texts such as "1,3,32,32", "2,7:int64" or "mask=2,7:int64".

    Raises:
        ModelError: not a shape, no dtype of PyTorch, or a name that stands twice.
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, _, shape = text.rpartition("=")
        if name in kwargs:
            raise ModelError(f"--input {text!r}: {name!r} is given twice.")
        if name:
            kwargs[name] = _read_input(text, shape)
        else:
            args.append(_read_input(text, shape))
    return Inputs(tuple(args), kwargs)


def check_there(images: Path | None, texts: Path | None = None) -> None:
    """Raise FolderError for a file of images or texts that does not exist, before anything is built."""
    if images is not None and not images.is_file():
        raise FolderError(f"--images {images}: expected {IMAGE_FILES}; there is no such file.")
    if texts is not None and not texts.is_file():
        raise FolderError(f"--texts {texts}: expected a file with a text in each line; there is no such file.")


def read_texts(path: Path) -> list[str]:
    """The lines of a file in which there is something.

    Raises:
        FolderError: no file of text, or an empty one.
    """
    found = read_text(path)
    if "\0" in found or any("\ud800" <= character <= "\udfff" for character in found):
        raise FolderError(
            f"--texts {path}: expected a file with a text in each line, in UTF-8, got other bytes; save it as UTF-8."
        )
    texts = [line.strip() for line in found.splitlines() if line.strip()]
    if not texts:
        raise FolderError(f"--texts {path}: expected a text in each line, got a file without any; give a hundred.")
    return texts


def read_images(path: Path, inputs: Inputs | None = None) -> Tensor:
    """Images (n, ...) from a file, see `IMAGE_FILES`; no code in it is run.

    Args:
        inputs: of the network that takes them; None where they are only looked at.
    Raises:
        FolderError: no such file, not one of these, or images whose imaginary part the network would not see.
    """
    try:
        found = _read_array(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, FolderError) as error:
        raise FolderError(f"--images {path}: expected {IMAGE_FILES}, got {type(error).__name__}: {error}.") from error
    if found.is_complex() and not any(t.is_complex() for t in (inputs.tensors() if inputs else ())):
        raise FolderError(
            f"--images {path}: expected real images, as the example input is, got {found.dtype}; save the part that is "
            "meant, or give a complex example with --input SHAPE:complex64."
        )
    return found


def _read_array(path: Path) -> Tensor:
    """Double precision becomes single, everything else stays what it is."""
    if path.suffix == ".safetensors":
        return load_images(path)
    if path.suffix in (".pt", ".pth"):
        return _take_images(read_torch_file(path, _REMEDY))
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"a file with the suffix {path.suffix!r}")
    found = np.load(path, allow_pickle=False)
    found = torch.from_numpy(np.ascontiguousarray(found if isinstance(found, np.ndarray) else found["images"]))
    return found.float() if found.dtype == torch.float64 else found


def _take_images(found: Any) -> Tensor:
    """A tensor itself, `images` of a dict, or the first of a tuple, behind which labels may be."""
    if isinstance(found, Mapping):
        found = found.get("images", found)
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"{show(found)} instead of a tensor; {_REMEDY}")
    return found.float() if found.dtype == torch.float64 else found


def _read_input(text: str, shape: str) -> Tensor:
    """Noise; whole numbers are 1 0 1 0 ..., which is valid for token numbers and for masks alike."""
    sizes, _, dtype_name = shape.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    parts = [part.strip() for part in sizes.split(",")]
    if not isinstance(dtype, torch.dtype) or not all(part.isdecimal() and int(part) for part in parts):
        raise ModelError(
            f"--input {text!r}: expected sizes, with a dtype of PyTorch or a name if need be, "
            "such as 1,3,224,224 or 2,7:int64 or mask=2,7:int64."
        )
    try:
        return _make_noise([int(part) for part in parts], dtype)
    except (RuntimeError, TypeError) as error:  # PyTorch cannot make such a tensor, or there is no memory for it
        raise ModelError(
            f"--input {text!r}: no example can be made of these sizes and this dtype ({str(error).splitlines()[0]}); "
            "give smaller sizes, or a dtype such as float32 or int64."
        ) from error


def _make_noise(dimensions: list[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_complex:
        return torch.randn(dimensions, generator=generator, dtype=torch.complex64).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(dimensions, generator=generator).to(dtype)
    return ((torch.arange(dimensions[-1]) + 1) % 2).expand(dimensions).to(dtype).contiguous()
