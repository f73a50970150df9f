"""What a family is: how a small random network of it is built, called, and which of its outputs matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Call = tuple[Any, ...] | dict[str, Any]
"""The positional, or the keyword, arguments of one forward."""


class Skipped(Exception):
    """A family that cannot be built here, and why."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        build: the network, with random weights.
        inputs: arguments of one call, drawn anew each time.
        answer: the field of the output that a user wants, where there are several; None for all.
        whole_heads: whether Torch-Pruning's examples remove whole heads in networks of this kind (its language models)
            and not dimensions inside heads (its vision transformers).
        single: whether an operation has no float64, so that the network is run in float32.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Call]
    answer: str | None = None
    whole_heads: bool = False
    single: bool = False

    def wanted(self, output: Any) -> list[Tensor]:
        """The tensors of an output that a user wants."""
        return tensors_of(output if self.answer is None else output[self.answer])


def call(model: nn.Module, inputs: Call) -> Any:
    copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    return model(**copied) if isinstance(copied, dict) else model(*copied)


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def as_double(inputs: Call) -> Call:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights to which the output reacts, of which no two are equal: gains, biases and statistics too."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.copy_(noise(parameter) * 1.2 / max(parameter.numel() // parameter.shape[0], 1) ** 0.5)
        elif parameter.is_floating_point():
            parameter.add_(0.3 * noise(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.5 + noise(buffer).abs())
        elif name.endswith("running_mean"):
            buffer.copy_(0.3 * noise(buffer))
        elif name.endswith(("weight", "bias", "rel_coords_log")) and buffer.is_floating_point():  # of frozen norms
            buffer.add_(0.3 * noise(buffer))
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
