"""The tensors of a network by name, and copies of networks."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from intrafusion.errors import ModelError


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of networks that hold tensors with a history."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the network ({type(model).__name__}) cannot be copied: {type(error).__name__}: {error}. "
            f"Remove what holds a computation graph or an open handle (old-style weight_norm: "
            f"torch.nn.utils.remove_weight_norm), or pass inplace=True on a network of your own."
        ) from error
