"""Batch-norm statistics measured anew on unlabelled images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from intrafusion.apply import named_tensors, write_
from intrafusion.batches import Images, fitted, joined, labelled
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.inputs import Inputs
from intrafusion.restore.restorer import Reduced, needed
from intrafusion.trace.state import preserved
from intrafusion.verify import copy_of


@dataclass(frozen=True)
class Reestimate:
    """Set the mean and variance of every batch norm to what its inputs have on unlabelled images.

    The images go through in batches, every batch norm normalising by its own batch and averaging over all of them, each
    batch weighing as many images as it has; everything else, dropout included, stays as in evaluation. Batch norms that
    never run, or that remember no statistics, are left alone. A few hundred images are enough.

    Attributes:
        batch: images that go through at a time; smaller batches are put together, larger ones cut.

    Reference: Wang et al. 2025, Fold-R; also known as recalibration of batch norms.
    """

    batch: int = 128

    needs_data = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ValueError(f"batch: expected at least 2 images, a variance of one is 0; got {self.batch!r}.")

    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: Images | None = None
    ) -> None:
        """Write running means and variances.

        Raises:
            ModelError: no images, or the network gives NaN on them.
        """
        chunks = rebatched(needed(images, self), self.batch)
        small = copy_of(compressed.model)
        names = {id(tensor): name for name, tensor in named_tensors(small).items()}
        norms = {
            name: m
            for name, m in small.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
        }
        new: dict[str, Tensor] = {}
        with preserved(small):
            with averaging(norms.values()) as seen:
                for chunk, count in chunks:
                    seen.count = count
                    fitted(chunk, small).call(small)
            for name, norm in norms.items():
                if norm in seen.images:
                    for statistic in (norm.running_mean, norm.running_var):
                        assert statistic is not None
                        check(statistic, name)
                        new[names[id(statistic)]] = statistic.clone()
        write_(compressed.model, new)


def check(statistic: Tensor, name: str) -> None:
    if not bool(torch.isfinite(statistic).all()):
        raise ModelError(f"{name}: its inputs are NaN or infinite on these images; check their scale.")


class Seen:
    """How many images each batch norm has averaged over, and how many the present batch has."""

    def __init__(self) -> None:
        self.images: dict[nn.Module, int] = {}
        self.count = 0


@contextlib.contextmanager
def averaging(norms: Iterable[_BatchNorm]) -> Iterator[Seen]:
    """Inside, these batch norms normalise by their batch, and their statistics are the average over all batches."""
    seen = Seen()

    def weigh(norm: nn.Module, args: Any) -> None:
        assert isinstance(norm, _BatchNorm)
        seen.images[norm] = seen.images.get(norm, 0) + seen.count
        norm.momentum = seen.count / seen.images[norm]

    with contextlib.ExitStack() as stack:
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
            stack.callback(norm.register_forward_pre_hook(weigh).remove)
        yield seen


# ---- batches of one size --------------------------------------------------------------------------------------------


def rebatched(images: Images, size: int) -> Iterator[tuple[Inputs, int]]:
    """Calls of about `size` images, never of one alone where there are more, and how many images each has.

    One batch is held at a time, with what is left over of the one before.
    """
    left: Inputs | None = None
    for call, _ in labelled(images):
        left = call if left is None else joined([left, call])
        while count(left) > size + 1:
            yield part(left, 0, size), size
            left = part(left, size, count(left))
    if left is not None:
        yield left, count(left)


def count(call: Inputs) -> int:
    """Images in a batch: the length of the first dimension of its first tensor."""
    tensors = [t for t in call.tensors() if t.dim()]
    return len(tensors[0]) if tensors else 1


def part(call: Inputs, start: int, stop: int) -> Inputs:
    total = count(call)

    def cut(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == total
        return value[start:stop] if batched else value

    return Inputs(tree_map(cut, call.args), tree_map(cut, call.kwargs))
