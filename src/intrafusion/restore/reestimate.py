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
from intrafusion.network.batches import ImagesLike, cast_like, check_batch, double_first, rebatch
from intrafusion.network.layers import watch_calls
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import check_graph, copy_model, named_tensors
from intrafusion.restore.restorer import Reduced, require_images
from intrafusion.surgery.write import write_weights_


@checked
@dataclass(frozen=True)
class Reestimate:
    """Set the mean and variance of every batch norm to what its inputs have on unlabelled images.

    The images go through in batches, every batch norm normalising by its own batch and averaging over all of them, each
    batch weighing as many rows as it has, of which padded ones, as an attention mask tells them, do not count;
    everything else, dropout included, stays as in evaluation. Batch norms that
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
                for chunk in chunks:
                    call = double_first(chunk)
                    averages.weights = call.weights
                    cast_like(call, small).call(small)
            for name in averages.rows:
                for statistic in (norms[name].running_mean, norms[name].running_var):
                    assert statistic is not None
                    _check_finite(statistic, name)
                    new[names[id(statistic)]] = statistic.clone()
        write_weights_(compressed.model, new)


def _check_finite(statistic: Tensor, name: str) -> None:
    if not bool(torch.isfinite(statistic).all()):
        raise ModelError(f"{name}: its inputs are NaN or infinite on these images; check their scale.")


class _Averages:
    """Over how many rows each batch norm has averaged, and how much the rows of the present batch count."""

    def __init__(self) -> None:
        self.rows: dict[str, float] = {}
        self.weights: RowWeights | None = None

    def take_share(self, name: str, rows: float) -> float:
        """The share of these among all rows so far, themselves included."""
        self.rows[name] = self.rows.get(name, 0.0) + rows
        return rows / self.rows[name]


@contextlib.contextmanager
def _average_batches(norms: Mapping[str, _BatchNorm]) -> Iterator[_Averages]:
    """Inside, these batch norms normalise by their batch, and their statistics are the average over all batches."""
    averages, after = _Averages(), dict[str, tuple[Tensor, Tensor]]()

    def reached(name: str, x: Tensor) -> None:
        norm, weights = norms[name], averages.weights
        norm.training = weights is None
        if weights is None:
            norm.momentum = averages.take_share(name, x.numel() // x.shape[1])
            return
        count, own, unbiased = _measure_counted(x, weights, name)
        share, remembered = averages.take_share(name, count), _list_statistics(norm)
        after[name] = tuple(t + share * (new - t) for t, new in zip(remembered, unbiased, strict=True))  # type: ignore[assignment]
        _remember_(norm, own)

    def called(name: str, x: Tensor, output: Tensor) -> None:
        if name in after:
            _remember_(norms[name], after.pop(name))

    for norm in norms.values():
        norm.reset_running_stats()
    with watch_calls(norms, called, reached=reached):
        yield averages


def _list_statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.double(), norm.running_var.double()


def _remember_(norm: _BatchNorm, statistics: tuple[Tensor, Tensor]) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(statistics[0])
    norm.running_var.copy_(statistics[1])


def _measure_counted(
    x: Tensor, weights: RowWeights, name: str
) -> tuple[float, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of the rows of x (n, c, ...): how many count, and mean and variance of these, biased and unbiased."""
    rows = x.movedim(1, -1)
    counts = weights.of_rows(rows, name).flatten()
    counted, counts = rows.flatten(0, -2)[counts > 0].double(), counts[counts > 0][:, None]
    total = counts.sum()
    mean = (counts * counted).sum(0) / total
    variance = (counts * (counted - mean).square()).sum(0) / total
    alike = total.square() / counts.square().sum()  # rows of one weight that tell as much
    return float(total), (mean, variance), (mean, variance * alike / (alike - 1).clamp(min=1))
