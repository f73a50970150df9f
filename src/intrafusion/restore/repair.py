"""REPAIR: the mean and the standard deviation of every layer's outputs set back to the original's, on images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike, cast_like, check_batch, double_first, make_reusable, rebatch
from intrafusion.network.layers import Layer, find_layers, is_convolution_or_linear, watch_calls
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import check_graph, copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.restorer import Reduced, require_images
from intrafusion.restore.statistics import find_output_merge
from intrafusion.surgery.maps import mean_weights
from intrafusion.surgery.write import write_weights_

_DEAD = 1e-4  # a channel that varies less than this fraction of what it should is not blown up


@checked
@dataclass(frozen=True)
class ActivationRepair:
    r"""Set mean and standard deviation of every layer's channels to the average of the original channels they merge.

    For channels y (behind a batch norm that directly follows, if there is one) and the merge as weighted means A,

        y'  <-  (y' - mean y') / std y' * (A std y) + A mean y,

    folded into the layer's weight and bias (or the norm's mean). One pass per network, in which each batch goes on
    with the corrected outputs. For networks without batch norm; where every layer has one it does what `Reestimate`
    does. A layer without bias or norm is only scaled; layers that run several times, transposed
    convolutions, tied and reparametrised weights are left alone.

    Attributes:
        batch: images that go through at a time; smaller batches are put together, larger ones cut.

    Reference: Jordan et al. 2023, REPAIR; Wang et al. 2025 use it on folded networks.
    """

    batch: int = 128

    needs_data = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        check_batch(self.batch)

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None = None
    ) -> None:
        """Write weights, biases and, behind layers without bias, the means of batch norms.

        Raises:
            ModelError: no images, or one of the networks gives NaN on them.
        """
        check_graph(graph, reference)
        reference = borrow(reference)
        images = make_reusable(require_images(images, self))  # they are read twice
        small = copy_model(compressed.model)
        layers = find_layers(small, graph, is_convolution_or_linear)
        originals = find_layers(reference, graph, is_convolution_or_linear)
        found = _measure(reference, {n: layer for n, layer in originals.items() if n in layers}, images, self.batch)
        maps = compressed.plan.maps
        targets = {name: _average(found[name], originals[name], graph, maps) for name in found}
        _repair_(small, {name: layers[name] for name in found}, targets, images, self.batch)
        changed = {id(t) for name in found for t in layers[name].writable}
        write_weights_(compressed.model, {n: t.detach() for n, t in named_tensors(small).items() if id(t) in changed})


@dataclass(eq=False)
class _Sums:
    """Mean and standard deviation (c,) per channel of all rows that were added, float64."""

    rows: float = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, rows: Tensor, counts: Tensor | None = None) -> None:
        """Rows (k, c), and how much each counts, (k,); None for all alike."""
        rows = rows.double()
        if counts is not None:
            rows, counts = rows[counts > 0], counts[counts > 0][:, None]
        weighed = rows if counts is None else counts * rows
        self.rows += len(rows) if counts is None else float(counts.sum())
        self.total = self.total + weighed.sum(0)
        self.squares = self.squares + (weighed * rows).sum(0)

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.rows

    @property
    def deviation(self) -> Tensor:
        return (torch.as_tensor(self.squares) / self.rows - self.mean.square()).clamp(min=0).sqrt()


_Target = tuple[Tensor, Tensor]
"""Mean and standard deviation (c,) that the channels of a layer should have."""


def _measure(model: nn.Module, layers: Mapping[str, Layer], images: ImagesLike, batch: int) -> dict[str, _Sums]:
    """Statistics of the outputs of each layer, behind its norm; of layers that run once in a forward pass."""
    found: dict[str, _Sums] = {name: _Sums() for name in layers}
    calls: Counter[str] = Counter()
    passes = 0

    weights: RowWeights | None = None

    def called(name: str, x: Tensor, output: Tensor) -> None:
        calls[name] += 1
        rows = _flatten_places(layers[name], layers[name].apply_norm(output))
        found[name].add(rows, _weigh_places(layers[name], output, weights))

    with preserve_state(model), watch_calls({n: layer.module for n, layer in layers.items()}, called):
        for call in rebatch(images, batch):
            call = double_first(call)
            weights = call.weights
            cast_like(call, model).call(model)
            passes += 1
    for name in layers:
        if calls[name] and not bool(torch.isfinite(found[name].mean).all()):
            raise ModelError(f"{name}: the original network gives NaN or infinity on these images; check their scale.")
    return {name: statistics for name, statistics in found.items() if calls[name] == passes}


def _flatten_places(layer: Layer, output: Tensor) -> Tensor:
    return output.movedim(layer.channel_dim, -1).flatten(0, -2)


def _weigh_places(layer: Layer, output: Tensor, weights: RowWeights | None) -> Tensor | None:
    counts = layer.weigh_rows(output, weights)
    return None if counts is None else counts.flatten()


def _average(found: _Sums, layer: Layer, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> _Target:
    merge = find_output_merge(layer, graph, maps)
    if merge is None:
        return found.mean, found.deviation
    mean = mean_weights(merge).to(found.mean)
    return mean @ found.mean, mean @ found.deviation


def _repair_(
    model: nn.Module, layers: Mapping[str, Layer], targets: Mapping[str, _Target], images: ImagesLike, batch: int
) -> None:
    """One pass in which every layer's outputs are set to their targets batch by batch, then written (in place)."""
    found: dict[str, _Sums] = {name: _Sums() for name in layers}
    weights: RowWeights | None = None

    def called(name: str, x: Tensor, output: Tensor) -> Tensor:
        layer, now = layers[name], _Sums()
        rows, counts = _flatten_places(layer, layer.apply_norm(output)), _weigh_places(layer, output, weights)
        for statistics in (now, found[name]):
            statistics.add(rows, counts)
        factor, constant = _find_correction(layer, now, targets[name])
        shape = [-1 if d == layer.channel_dim % output.dim() else 1 for d in range(output.dim())]
        return output * factor.to(output).reshape(shape) + constant.to(output).reshape(shape)

    with preserve_state(model), watch_calls({n: layer.module for n, layer in layers.items()}, called):
        for call in rebatch(images, batch):
            call = double_first(call)
            weights = call.weights
            cast_like(call, model).call(model)
    for name, layer in layers.items():
        if not bool(torch.isfinite(found[name].mean).all()):
            raise ModelError(f"{name}: the smaller network gives NaN or infinity on these images.")
        factor, constant = _find_correction(layer, found[name], targets[name])
        more = (factor - 1)[:, None] * layer.matrix.detach().double()
        bias = 0.0 if layer.module.bias is None else layer.module.bias.detach().double()
        layer.add_(more, constant + (factor - 1) * bias)


def _find_correction(layer: Layer, now: _Sums, target: _Target) -> tuple[Tensor, Tensor]:
    """Factor and constant (c,) for the layer's own output that give what comes behind its norm these statistics."""
    mean, deviation = target
    alive = now.deviation > _DEAD * deviation
    factor = torch.where(alive, deviation / torch.where(alive, now.deviation, 1.0), 1.0)
    if not layer.takes_constant:
        return factor, torch.zeros_like(factor)
    constant = mean - factor * now.mean  # of what comes behind the norm
    if layer.norm is None:
        return factor, constant
    zero = torch.zeros(1, len(factor), dtype=torch.float64, device=factor.device)
    offset = layer.norm(zero)[0]  # norm(u) = slope u + offset, wanted: factor norm(u) + constant
    return factor, layer.before_norm((factor - 1) * offset + constant)
