"""Mean and covariance of a group's channels as its consumers read them, measured on images."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.batches import ImagesLike, cast_like, join_batches, read_batches
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import Moments
from intrafusion.restore.layers import Layer, hooked, solvable
from intrafusion.restore.ridge import gram
from intrafusion.surgery.norms import fold_norms

DEAD = 1e-12  # a channel with less than this fraction of the largest variance does not vary


def points(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[tuple[Layer, Member]]:
    """The layers that read a group along their second dimension."""
    members = [m for m in group.with_role(Role.CONSUMES) if m.dim == 1 and m.within is None]
    return [(layers[m.module], m) for m in members if m.tensor.endswith("weight") and m.module in layers]


def folded(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Every floating tensor of a network in float64, foldable norms folded."""
    return fold_norms({n: t for n, t in named_tensors(model).items() if t.is_floating_point()}, graph.norms)


def reader_of(readers: Iterable[tuple[Layer, Member]], weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of W_c W_c^T over consumers and kernel positions, (n, n)."""
    total = []
    for _, member in readers:
        columns = weights[member.tensor].movedim(1, 0)
        columns = columns[torch.from_numpy(member.positions).to(columns.device)].flatten(1).float()
        total.append((columns @ columns.T).double())
    return torch.stack(total).sum(0)


def measured(
    model: nn.Module, graph: ChannelGraph, images: ImagesLike, *, rows: int = 20_000, seed: int = 0
) -> dict[str, Moments]:
    """Moments of every group that a dense layer reads, from one forward pass of the original network.

    Args:
        images: unlabelled; see `intrafusion.network.batches`.
        rows: sampled places per layer.
    Raises:
        ModelError: no images, or images that the network does not run on.
    """
    reading = Reading(model, graph, rows, seed)
    with preserve_state(model), reading:
        cast_like(join_batches(read_batches(images)), model).call(model)
    return reading.moments()


class Reading(contextlib.ExitStack):
    """Takes the moments of what dense layers read in the forward pass that runs inside."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, rows: int = 20_000, seed: int = 0) -> None:
        super().__init__()
        self.model, self.graph, self.rows, self.seed = model, graph, rows, seed
        self.layers = solvable(model, graph)
        self.read = {g.name: points(g, self.layers) for g in graph.reducible if g.is_channel}
        self.members: dict[str, list[tuple[str, Member]]] = defaultdict(list)
        for group, readers in self.read.items():
            for layer, member in readers:
                self.members[layer.name].append((group, member))
        self.found: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)

    def __enter__(self) -> Reading:
        self.enter_context(hooked({name: self.layers[name] for name in self.members}, reached=self.reached))
        return self

    def reached(self, name: str, x: Tensor) -> None:
        like = x if x.dim() < 2 else x.movedim(self.layers[name].channel_dim, -1)
        places = self.layers[name].sampled(like.shape[:-1], self.rows, self.seed).to(x.device)
        sampled = like[tuple(places.T)]
        for group, member in self.members[name]:
            self.found[group][name] = moments_of(sampled, member)

    def moments(self) -> dict[str, Moments]:
        """By group; norms are folded as they are now."""
        weights, moments = folded(self.model, self.graph), {}
        for group, seen in self.found.items():
            reader = reader_of([(layer, member) for layer, member in self.read[group] if layer.name in seen], weights)
            means, covariances = (torch.stack(parts) for parts in zip(*seen.values(), strict=True))
            moments[group] = Moments(means, covariances, reader)
        return moments


def moments_of(rows: Tensor, member: Member) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the channels, over rows and over the slots of each channel, float64; see `shrunk`."""
    places = torch.from_numpy(member.positions).to(rows.device)
    every = len(places) == rows.shape[1] and torch.equal(places.flatten(), torch.arange(len(places)).to(places))
    channels = rows if every else rows[:, places].movedim(1, -1).flatten(0, -2)
    channels = channels if channels.dtype == torch.float64 else channels.float()
    mean = channels.mean(0)
    centred = channels - mean
    return mean.double(), shrunk(gram(centred) / len(centred), len(centred))


def shrunk(covariance: Tensor, rows: int) -> Tensor:
    r"""A covariance (n, n) that rows as few as channels do not take for a close tie between channels.

    Correlations R become (1 - rho) R off the diagonal, variances stay;  with n channels that vary and k rows

        rho = ((1 - 2/n) tr R^2 + n^2) / ((k + 1 - 2/n) (tr R^2 - n)),  at most 1.

    Reference: Chen, Wiesel, Eldar and Hero 2010, equation 23 (oracle approximating shrinkage), applied to correlations
        as in Schaefer and Strimmer 2005.
    """
    variances = covariance.diagonal().clone()
    alive = variances > DEAD * variances.max()
    scale = torch.where(alive, variances, torch.inf).rsqrt()
    squares = float((scale[:, None] * covariance * scale).square().sum())
    n = max(int(alive.sum()), 2)
    rho = ((1 - 2 / n) * squares + n**2) / max((rows + 1 - 2 / n) * (squares - n), 1e-30)
    result = covariance * (1 - min(rho, 1.0))
    result.diagonal().copy_(variances)
    return result
