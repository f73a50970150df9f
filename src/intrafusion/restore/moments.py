"""Mean and covariance of a group's channels as its consumers read them, measured on images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from intrafusion.apply import named_tensors
from intrafusion.batches import Images, batches, fitted, joined
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.norms import fold
from intrafusion.reduce.problem import Moments
from intrafusion.restore.layers import Layer, hooked, solvable
from intrafusion.trace.state import preserved


def points(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[tuple[Layer, Member]]:
    """The layers that read a group along their second dimension."""
    members = [m for m in group.with_role(Role.CONSUMES) if m.dim == 1 and m.within is None]
    return [(layers[m.module], m) for m in members if m.tensor.endswith("weight") and m.module in layers]


def folded(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Every floating tensor of a network in float64, foldable norms folded."""
    return fold({n: t for n, t in named_tensors(model).items() if t.is_floating_point()}, graph.norms)


def reader_of(readers: Iterable[tuple[Layer, Member]], weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of W_c W_c^T over consumers and kernel positions, (n, n)."""
    total = []
    for _, member in readers:
        columns = weights[member.tensor].movedim(1, 0)
        columns = columns[torch.from_numpy(member.positions).to(columns.device)].flatten(1)
        total.append(columns @ columns.T)
    return torch.stack(total).sum(0)


def measured(
    model: nn.Module, graph: ChannelGraph, images: Images, *, rows: int = 20_000, seed: int = 0
) -> dict[str, Moments]:
    """Moments of every group that a dense layer reads, from one forward pass of the original network.

    Args:
        images: unlabelled; see `intrafusion.batches`.
        rows: sampled places per layer.
    Raises:
        ModelError: no images, or images that the network does not run on.
    """
    layers = solvable(model, graph)
    read = {g.name: points(g, layers) for g in graph.reducible if g.kind == "channel"}
    readers: dict[str, list[tuple[str, Member]]] = defaultdict(list)
    for group, all_readers in read.items():
        for layer, member in all_readers:
            readers[layer.name].append((group, member))
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)

    def called(name: str, x: Tensor, output: Tensor) -> None:
        like = x if x.dim() < 2 else x.movedim(layers[name].channel_dim, -1)
        places = layers[name].sampled(like.shape[:-1], rows, seed).to(x.device)
        sampled = like[tuple(places.T)].double()
        for group, member in readers[name]:
            found[group][name] = moments_of(sampled, member)

    with preserved(model), hooked({name: layers[name] for name in readers}, called):
        fitted(joined(batches(images)), model).call(model)
    weights = folded(model, graph)
    return {
        group: Moments(
            *zip(*pairs.values(), strict=True),
            reader=reader_of([(layer, m) for layer, m in read[group] if layer.name in pairs], weights),
        )  # type: ignore[arg-type]
        for group, pairs in found.items()
    }


def moments_of(rows: Tensor, member: Member) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the channels, over rows and over the slots of each channel."""
    channels = rows[:, torch.from_numpy(member.positions).to(rows.device)]
    channels = channels.movedim(1, -1).flatten(0, -2)
    return channels.mean(0), torch.atleast_2d(torch.cov(channels.T, correction=0))
