"""Layer norms whose statistics are those of another run, so that what is around them can be compared.

A norm over a stream of which channels are removed gives something else, as it must. Where mean and deviation of every
position are those of the original without these channels, the rest is pointwise, and the two networks must agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.network.modes import Mode
from intrafusion.trace.decomposition import unfuse

Statistics = list[tuple[Tensor, Tensor]]
"""Mean and reciprocal deviation of each layer norm that ran."""


class _Noting(Mode):
    """Notes the statistics of every layer norm."""

    def __init__(self, noted: Statistics) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            self.noted.append(found[1:])
        return found


class _Using(Mode):
    """Has every layer norm use the statistics that were noted, in the same order."""

    def __init__(self, noted: Statistics) -> None:
        super().__init__()
        self.left = list(reversed(noted))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.native_layer_norm.default:
            return func(*args, **(kwargs or {}))
        x, _, weight, bias = args[:4]
        mean, scale = self.left.pop() if self.left else (None, None)
        if mean is None or mean.shape[:-1] != x.shape[:-1]:
            raise ModelError("the two networks run other layer norms")
        out = (x - mean) * scale
        out = out if weight is None else out * weight
        return out if bias is None else out + bias, mean, scale


@contextlib.contextmanager
def noted_statistics(model: nn.Module, noted: Statistics) -> Iterator[None]:
    """Note the statistics of all layer norms that run."""
    with unfuse(model), _Noting(noted):
        yield


@contextlib.contextmanager
def frozen_statistics(model: nn.Module, noted: Statistics) -> Iterator[None]:
    """Have all layer norms that run use statistics that were noted, one after the other."""
    with unfuse(model), _Using(noted):
        yield
