"""Mean and covariance of a group's channels as its consumers read them, measured on images."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Role
from intrafusion.network.batches import ImagesLike, cast_like, join_batches, read_batches
from intrafusion.network.gram import find_scale, square_rows
from intrafusion.network.layers import Layer, Port, find_layers, watch_calls
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import Moments
from intrafusion.surgery.norms import fold_norms

_NO_VARIANCE = 1e-12  # a channel with less than this fraction of the largest variance does not vary


def find_readers(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[Port]:
    """Where dense layers read a group."""
    members = [m for m in group.with_role(Role.CONSUMES) if m.dim == 1 and m.within is None]
    return [Port.of(layers[m.module], m) for m in members if m.tensor.endswith("weight") and m.module in layers]


def _fold_all(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Every floating tensor of a network in float64, foldable norms folded."""
    return fold_norms({n: t for n, t in named_tensors(model).items() if t.is_floating_point()}, graph.norms)


def _square_columns(readers: Iterable[Port], weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of W_c W_c^T over consumers and kernel positions, (n, n)."""
    total = []
    for port in readers:
        columns = weights[port.weight].movedim(1, 0)
        columns = columns[port.positions.to(columns.device)].flatten(1)
        scale = find_scale(columns)
        columns = (columns / scale).float()
        total.append((columns @ columns.T).double() * scale**2)
    return torch.stack(total).sum(0)


def measure_moments(
    model: nn.Module, graph: ChannelGraph, images: ImagesLike, *, rows: int = 20_000, seed: int = 0
) -> dict[str, Moments]:
    """Moments of every group that a dense layer reads, from one forward pass of the original network.

    Args:
        images: unlabelled; see `intrafusion.network.batches`.
        rows: sampled places per layer.
    Raises:
        ModelError: no images, or images that the network does not run on.
    """
    taker = MomentTaker(model, graph, rows, seed)
    with preserve_state(model), taker:
        cast_like(join_batches(read_batches(images)), model).call(model)
    return taker.moments()


class MomentTaker(contextlib.ExitStack):
    """Takes the moments of what dense layers read in the forward pass that runs inside."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, rows: int = 20_000, seed: int = 0) -> None:
        super().__init__()
        self.model, self.graph, self.rows, self.seed = model, graph, rows, seed
        layers = find_layers(model, graph)
        self.readers = {g.name: find_readers(g, layers) for g in graph.reducible if g.kind == "channel"}
        self.ports: dict[str, list[tuple[str, Port]]] = defaultdict(list)  # by layer, with the group
        for group, readers in self.readers.items():
            for port in readers:
                self.ports[port.layer.name].append((group, port))
        self.layers = {name: layers[name] for name in self.ports}
        self.found: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)

    def __enter__(self) -> MomentTaker:
        modules = {name: layer.module for name, layer in self.layers.items()}
        self.enter_context(watch_calls(modules, reached=self.reached))
        return self

    def reached(self, name: str, x: Tensor) -> None:
        layer = self.layers[name]
        rows = layer.take_rows(x, layer.sample_places(x, self.rows, self.seed))
        for group, port in self.ports[name]:
            self.found[group][name] = _take_moments(rows, port.positions)

    def moments(self) -> dict[str, Moments]:
        """By group; norms are folded as they are now."""
        weights, moments = _fold_all(self.model, self.graph), {}
        for group, by_layer in self.found.items():
            reader = _square_columns([p for p in self.readers[group] if p.layer.name in by_layer], weights)
            means, covariances = (torch.stack(parts) for parts in zip(*by_layer.values(), strict=True))
            moments[group] = Moments(means, covariances, reader)
        return moments


def _take_moments(rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the channels at positions (n, slots) of rows, over rows and slots, float64."""
    positions = positions.to(rows.device)
    every = len(positions) == rows.shape[1] and torch.equal(
        positions.flatten(), torch.arange(len(positions)).to(positions)
    )
    channels = rows if every else rows[:, positions].movedim(1, -1).flatten(0, -2)
    channels = channels if channels.dtype == torch.float64 else channels.float()
    scale = find_scale(channels)
    channels = channels / scale
    mean = channels.mean(0)
    centred = channels - mean
    covariance = shrink(square_rows(centred) / len(centred), len(centred))
    return mean.double() * scale, covariance * scale**2


def shrink(covariance: Tensor, rows: int) -> Tensor:
    r"""A covariance (n, n) that rows as few as channels do not take for a close tie between channels.

    Correlations R become (1 - rho) R off the diagonal, variances stay;  with n channels that vary and k rows

        rho = ((1 - 2/n) tr R^2 + n^2) / ((k + 1 - 2/n) (tr R^2 - n)),  at most 1.

    Reference: Chen, Wiesel, Eldar and Hero 2010, equation 23 (oracle approximating shrinkage), applied to correlations
        as in Schaefer and Strimmer 2005.
    """
    variances = covariance.diagonal().clone()
    alive = variances > _NO_VARIANCE * variances.max()
    scale = torch.where(alive, variances, torch.inf).rsqrt()
    squares = float((scale[:, None] * covariance * scale).square().sum())
    n = max(int(alive.sum()), 2)
    rho = ((1 - 2 / n) * squares + n**2) / max((rows + 1 - 2 / n) * (squares - n), 1e-30)
    result = covariance * (1 - min(rho, 1.0))
    result.diagonal().copy_(variances)
    return result
