"""Averaging unlike channels makes them weaker; this gives them the strength of those that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from intrafusion.fusion.align import FoldedNetwork, GroupMaps, find_moves, find_passages
from intrafusion.fusion.match import GroupPair
from intrafusion.fusion.move import move_channels
from intrafusion.fusion.outputs import is_along_outputs
from intrafusion.graph import ChannelGraph, FoldableNorm, Role
from intrafusion.importance.features import channel_rows
from intrafusion.surgery.maps import mean_weights

_LARGEST = 10.0  # channels that cancel are not blown up further than this


def find_lengths(
    own: FoldedNetwork, anchor: ChannelGraph, model: nn.Module, pairs: Sequence[GroupPair], maps: GroupMaps
) -> dict[str, Tensor]:
    """For every layer that produces channels that were moved: the mean length of the rows that each new one merges.

    Returns:
        (m,) float64 by name of the weight, 0 for outputs that belong to no group that was moved.
    """
    passages, found = find_passages(pairs), {}
    for pair in pairs:
        for mine, theirs in pair.members:
            if Role.PRODUCES in mine.roles and is_along_outputs(model.get_submodule(mine.module), mine):
                moves = find_moves(pair, mine, passages, maps)
                if moves is None or mine.positions.shape[1] > 1:
                    continue
                shape = anchor.shapes[mine.tensor]
                rows = channel_rows({mine.tensor: move_channels(own.weights[mine.tensor], moves, shape)}, mine)
                new = found.setdefault(mine.tensor, rows.new_zeros(shape[mine.dim], dtype=torch.float64))
                new[theirs.positions[:, 0]] = mean_weights(maps[pair.name].merge).to(rows) @ rows.norm(dim=1)
    return found


def strengthen(
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
        scale = torch.where((own > 0) & (wanted > 0), wanted / own.clamp(min=1e-300), 1.0).clamp(max=_LARGEST)
        scaled[name] = (rows * scale.reshape(-1, *[1] * (rows.dim() - 1))).movedim(0, dims[name])
        norm = by_weight.get(name)
        if norm is not None and norm.bias is not None:
            beta = means[norm.bias]
            scaled[norm.bias] = scale * (tensors[norm.bias] - beta) + beta
        elif norm is not None:
            scaled[norm.mean] = scale * tensors[norm.mean]
    return scaled
