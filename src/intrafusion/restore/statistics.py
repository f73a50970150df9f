"""What a reduction means for the statistics of the channels it merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.layers import Layer, Port
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.maps import compose_merges, matrix_for
from intrafusion.surgery.streams import is_turned, take_entries

_PER_CHANNEL = frozenset({Role.PRODUCES, Role.SCALES, Role.SHIFTS, Role.MEAN, Role.VARIANCE, Role.FOLLOWS})
_GIVES = frozenset({Role.PRODUCES, Role.MATCHES})
_OUTPUTS = _GIVES | {Role.SCALES}


def find_merge(tensor: str, size: int, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> Tensor | None:
    """What the merges do along the first dimension of a tensor, as one (m, n) float64 matrix on the CPU; None
    for nothing.

    Args:
        tensor: name of a tensor that has one entry, or one row, per channel.
        size: n, the length of that dimension in the original network.
    """
    touching = [
        (member, maps[group.name].merge) for group in graph.groups if group.name in maps for member in group.members
        if member.tensor == tensor and member.dim == 0 and member.roles & _PER_CHANNEL and member.within is None
    ]  # fmt: skip
    return compose_merges(touching, size) if touching else None


def find_output_merge(layer: Layer, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> Tensor | None:
    """What the maps do to the outputs of a layer of the original network, as one (m, n) float64 matrix on the CPU.

    Keys, say, are transformed as what reads the channels; factors that were put on a map count, and scales that a
    rotation took into the layer. None for nothing.
    """
    touching = [
        (replace(member, positions=positions), _merge_at(member, reduction) * _find_scale(layer, group, reduction))
        for group in graph.groups if (reduction := maps.get(group.name)) is not None
        for member in group.members if member.tensor == layer.weight_name
        if (positions := _find_outputs(layer, group, member)) is not None
    ]  # fmt: skip
    return compose_merges(touching, layer.all_outputs) if touching else None


def _find_outputs(layer: Layer, group: ChannelGroup, member: Member) -> np.ndarray | None:
    """Which outputs of a layer are the channels that a member of its weight runs through; None where they are none."""
    if member.dim == layer.output_dim:
        return Port.of(layer, member).positions.numpy() if member.roles & _OUTPUTS else None
    if layer.groups == 1 or layer.input_dim or (group.is_channel and Role.SCALES not in member.roles):
        return None
    weight = layer.module.weight  # transposed, (inputs, outputs of one group); the channels are whole groups
    groups = np.unique(member.positions // (len(weight) // layer.groups), axis=1)
    return (groups[..., None] * weight.shape[1] + np.arange(weight.shape[1])).reshape(len(groups), -1)


def _find_scale(layer: Layer, group: ChannelGroup, reduction: ReductionMap) -> Tensor | float:
    """Of each channel, (n,), where a rotation took it into the layer; else 1."""
    if layer.scale is None or not is_turned(group, reduction) or group.rotation is None:
        return 1.0
    (name,) = (s.scale for s in group.rotation.scales if s.weight == layer.weight_name)
    places = {(m.tensor, m.dim): m for m in group.members}
    return take_entries(layer.scale.detach().double().cpu(), name, places)


def _merge_at(member: Member, reduction: ReductionMap) -> Tensor:
    """What a map does to channels that a layer gives; a depthwise one gives what it reads, scaled."""
    return matrix_for(member, reduction, average=False) if member.roles & _GIVES else reduction.merge


def likeness(shape: Sequence[int], reach: float) -> Tensor:
    """K_pq = exp(-|p - q| / reach) between the positions p, q of a kernel, (k, k); the identity for reach 0."""
    if not shape:
        return torch.ones(1, 1, dtype=torch.float64)
    places = torch.cartesian_prod(*(torch.arange(s, dtype=torch.float64) for s in shape)).reshape(-1, len(shape))
    distance = torch.cdist(places, places)
    return torch.exp(-distance / reach) if reach > 0 else (distance == 0).double()


def correlations(rows: Tensor, reach: float) -> Tensor:
    r"""Correlation of <w_i, x> and <w_j, x> over patches x with covariance I (x) K; 0 with a zero row, 1 with itself.

    Args:
        rows: (n, inputs, *kernel).
        reach: of K in pixels; see `likeness`.
    Returns:
        (n, n) float64.
    """
    found = patch_products(rows, reach)
    size = found.diagonal().clamp(min=1e-60).sqrt()
    return (found / torch.outer(size, size)).clamp(-1, 1).fill_diagonal_(1.0)


def patch_products(rows: Tensor, reach: float) -> Tensor:
    """Covariance of <w_i, x> and <w_j, x> over the patches of `correlations`, (n, n) float64."""
    rows = rows.double()
    taps = rows.reshape(len(rows), rows.shape[1] if rows.dim() > 1 else 1, -1)
    root = torch.linalg.cholesky(likeness(tuple(rows.shape[2:]), reach)).to(taps)
    seen = (taps @ root).flatten(1)
    return seen @ seen.T


def merge_variances(merge: Tensor, deviations: Tensor, alike: Tensor, floor: float) -> Tensor:
    r"""Variance of M y for channels y of standard deviations d and correlations R:  diag(M D R D M^T).

    Never below `floor` times what it would be for uncorrelated channels. Where M is the mean of N channels of equal d
    and E is the mean of R over pairs, this is  d^2 (1 + (N - 1) E) / N,  Wang et al. 2025's closed form.

    Args:
        merge: M (m, n).
        deviations: d (n,), >= 0.
        alike: R (n, n).
    Returns:
        (m,) float64.
    """
    scaled = merge.double() * deviations.double()
    return torch.maximum((scaled @ alike * scaled).sum(1), floor * scaled.square().sum(1))
