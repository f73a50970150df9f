"""Averaging unlike channels makes them weaker; this gives them the strength of those that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from intrafusion.fusion.align import Maps, Side, crossing, crossings
from intrafusion.fusion.carry import carried
from intrafusion.fusion.match import Pair
from intrafusion.fusion.outputs import channels_lie_in
from intrafusion.graph import ChannelGraph, FoldableNorm, Role
from intrafusion.importance.features import channel_rows
from intrafusion.surgery.maps import mean_weights

LARGEST = 10.0  # channels that cancel are not blown up further than this


def lengths(own: Side, anchor: ChannelGraph, model: nn.Module, pairs: Sequence[Pair], maps: Maps) -> dict[str, Tensor]:
    """For every layer that produces channels that were moved: the mean length of the rows that each new one merges.

    Returns:
        (m,) float64 by name of the weight, 0 for outputs that belong to no group that was moved.
    """
    through, found = crossings(pairs), {}
    for pair in pairs:
        for mine, theirs in pair.members:
            if Role.PRODUCES in mine.roles and channels_lie_in(model.get_submodule(mine.module), mine):
                tracks = crossing(pair, mine, through, maps)
                if tracks is None or mine.positions.shape[1] > 1:
                    continue
                shape = anchor.shapes[mine.tensor]
                rows = channel_rows({mine.tensor: carried(own.weights[mine.tensor], tracks, shape)}, mine)
                new = found.setdefault(mine.tensor, rows.new_zeros(shape[mine.dim], dtype=torch.float64))
                new[theirs.positions[:, 0]] = mean_weights(maps[pair.name].merge).to(rows) @ rows.norm(dim=1)
    return found


def strengthened(
    tensors: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    norms: Sequence[FoldableNorm],
    dims: Mapping[str, int],
) -> dict[str, Tensor]:
    r"""Scale every averaged row w to the mean length of the rows that it was averaged from.

    With unit covariance of what a layer reads, the deviation of its output is |w|. Behind a batch norm the mean of the
    output is the norm's bias beta, and the scaling is about that mean:  w <- s w,  b <- s (b - beta) + beta.

    Args:
        tensors: averaged, norms folded.
        lengths: wanted length of every row by name of the weight; 0 leaves a row alone.
        means: averaged beta, by name of the norm's bias.
        dims: the output dimension of each of these weights.
    Returns:
        a copy with these weights, and the biases of their norms, rewritten.
    Reference: OURS, after the variance collapse of Jordan et al. 2023 (REPAIR), without data.
    """
    scaled = dict(tensors)
    by_weight = {n.producer_weight: n for n in norms}
    for name, wanted in lengths.items():
        rows = tensors[name].movedim(dims[name], 0)
        own = rows.flatten(1).norm(dim=1)
        scale = torch.where((own > 0) & (wanted > 0), wanted / own.clamp(min=1e-300), 1.0).clamp(max=LARGEST)
        scaled[name] = (rows * scale.reshape(-1, *[1] * (rows.dim() - 1))).movedim(0, dims[name])
        norm = by_weight.get(name)
        if norm is not None and norm.bias is not None:
            beta = means[norm.bias]
            scaled[norm.bias] = scale * (tensors[norm.bias] - beta) + beta
        elif norm is not None:
            scaled[norm.mean] = scale * tensors[norm.mean]
    return scaled
