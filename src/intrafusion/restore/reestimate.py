"""Batch-norm statistics measured anew on unlabelled images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import ImagesLike, cast_like, check_batch, rebatch
from intrafusion.network.layers import watch_calls
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import check_graph, copy_model, named_tensors
from intrafusion.restore.restorer import Reduced, require_images
from intrafusion.surgery.write import write_weights_


@checked
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
        check_batch(self.batch)

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None = None
    ) -> None:
        """Write running means and variances.

        Raises:
            ModelError: no images, or the network gives NaN on them.
        """
        check_graph(graph, reference)
        chunks = rebatch(require_images(images, self), self.batch)
        small = copy_model(compressed.model)
        names = {id(tensor): name for name, tensor in named_tensors(small).items()}
        norms = {
            name: m
            for name, m in small.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
        }
        new: dict[str, Tensor] = {}
        with preserve_state(small):
            with _average_batches(norms) as averages:
                for chunk, count in chunks:
                    averages.count = count
                    cast_like(chunk, small).call(small)
            for name in averages.images:
                for statistic in (norms[name].running_mean, norms[name].running_var):
                    assert statistic is not None
                    _check_finite(statistic, name)
                    new[names[id(statistic)]] = statistic.clone()
        write_weights_(compressed.model, new)


def _check_finite(statistic: Tensor, name: str) -> None:
    if not bool(torch.isfinite(statistic).all()):
        raise ModelError(f"{name}: its inputs are NaN or infinite on these images; check their scale.")


class _Averages:
    """How many images each batch norm has averaged over, and how many the present batch has."""

    def __init__(self) -> None:
        self.images: dict[str, int] = {}
        self.count = 0


@contextlib.contextmanager
def _average_batches(norms: Mapping[str, _BatchNorm]) -> Iterator[_Averages]:
    """Inside, these batch norms normalise by their batch, and their statistics are the average over all batches."""
    averages = _Averages()

    def weigh(name: str, x: Tensor) -> None:
        averages.images[name] = averages.images.get(name, 0) + averages.count
        norms[name].momentum = averages.count / averages.images[name]

    for norm in norms.values():
        norm.reset_running_stats()
        norm.training = True
    with watch_calls(norms, reached=weigh):
        yield averages
