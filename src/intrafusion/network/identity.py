"""What tells one network from another: its class, its layers and its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.network.tensors import named_tensors

_LONGEST = 200
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Identity:
    """Of a network as it was at one time.

    Attributes:
        name: of its class, with the module.
        layers: class of every module, and what it says of itself, such as "Conv2d(3, 8, kernel_size=(3, 3))"; by name.
        sha256: of all parameters and buffers, with names, kinds and shapes.
    """

    name: str
    layers: Mapping[str, str]
    sha256: str

    __repr__ = show_briefly


def identify(model: nn.Module) -> Identity:
    kind, digest = type(model), digest_tensors(named_tensors(model))
    return Identity(f"{kind.__module__}.{kind.__qualname__}", describe_layers(model), digest)


def describe_layers(model: nn.Module) -> dict[str, str]:
    return {name: _describe(module) for name, module in model.named_modules()}


def _describe(module: nn.Module) -> str:
    try:
        told = module.extra_repr()
    except Exception:  # a module of the user's that cannot speak of itself
        told = ""
    told = "" if "tensor(" in told else _ADDRESS.sub("", told)  # neither values nor places in memory
    return f"{type(module).__name__}({told})"[:_LONGEST]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, kinds, shapes and entries."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.layout == torch.strided and not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
