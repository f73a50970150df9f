"""Tensors on their way into a safetensors file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from intrafusion.errors import ModelError


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
