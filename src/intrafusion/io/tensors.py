"""Tensors on their way into a safetensors file, and out of one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parameter import is_lazy

from intrafusion.errors import FolderError, ModelError


def detach_dense(name: str, tensor: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own.

    Raises:
        ModelError: a tensor without values, or a sparse one.
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise ModelError(
            f"save: {name!r} has no dense values ({type(tensor).__name__}, {tensor.layout}, device {tensor.device}), "
            "as a file needs them; move it from the device meta, run a lazy network once, or call to_dense()."
        )
    return tensor.detach().cpu().contiguous().clone()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Each in memory of its own, laid out as that of the network that was saved, so that it computes the same bits.

    Raises:
        FolderError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise FolderError(f"{path.parent}: has no {path.name}; it was not saved completely, or something was removed.")
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}  # else they lie in the mapped file
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise FolderError(
            f"{path}: not a safetensors file, or a damaged one ({error}); save or fetch it again."
        ) from error
