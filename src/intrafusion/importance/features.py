"""The vector that describes each channel of a group: everything that comes in and everything that goes out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intrafusion.errors import ArgumentError, ModelError
from intrafusion.graph import READS, ChannelGroup, Member, Role


def channel_rows(weights: Mapping[str, Tensor], member: Member) -> Tensor:
    """One row per channel: all entries of the member's tensor that belong to it, over its slots and other dimensions.

    Returns:
        (n, d) float64, d = slots * (size of the other dimensions, inside `within` where the member has one).
    """
    tensor = _find_weight(weights, member)
    positions = torch.as_tensor(member.positions, dtype=torch.long, device=tensor.device)
    if member.within is not None and member.within.dim != member.dim:
        tensor = tensor.narrow(member.within.dim, member.within.start, member.within.stop - member.within.start)
    return tensor.detach().movedim(member.dim, 0)[positions].flatten(1).double()


def _find_weight(weights: Mapping[str, Tensor], member: Member) -> Tensor:
    if member.tensor not in weights:
        raise ArgumentError(
            f"weights: expected the tensors of the group's network, got none of the name {member.tensor!r}; "
            "`fold_weights(model, graph, groups)` gives them."
        )
    return weights[member.tensor]


def linear_rows(group: ChannelGroup, weights: Mapping[str, Tensor], *, scales: bool = False) -> list[Tensor]:
    """The rows of every member that weighs channels, in execution order: one (n, d) matrix per member.

    These are producers, consumers and depthwise kernels. Scales and statistics of norms are left out: where a norm can
    be folded they say nothing, elsewhere they are no part of a linear map.

    Args:
        scales: take the scales of norms too, for weights in which norms are not folded.
    """
    members = [m for m in group.members if weighs(m, weights) or (scales and Role.SCALES in m.roles)]
    return [channel_rows(weights, member) for member in members]


def weighs(member: Member, weights: Mapping[str, Tensor]) -> bool:
    kernel = Role.SCALES in member.roles and _find_weight(weights, member).dim() > 1
    return kernel or bool(member.roles & {Role.PRODUCES, *READS})


def describing_rows(
    group: ChannelGroup, weights: Mapping[str, Tensor], *, raw: bool = False, balanced: bool = False
) -> list[tuple[Member, Tensor]]:
    """The rows (n, d) by which the channels of a group are told apart, of each member, in execution order.

    Args:
        weights: tensors by name, norms folded (`intrafusion.surgery.norms.fold_norms`) unless `raw`.
        raw: weights are those of the network as it is: scales and shifts of norms and biases describe a channel too.
        balanced: the rows of each member are divided by their root mean squared length, so that all weigh alike.
    Raises:
        ModelError: no member of the group weighs its channels.
    """
    told = [m for m in group.members if weighs(m, weights) or (raw and m.roles & {Role.SCALES, Role.SHIFTS})]
    if not told:
        raise ModelError(f"group {group.name!r}: no weight describes its channels; exclude the group.")
    rows = [(m, channel_rows(weights, m)) for m in told]
    return [(m, _balance(r)) for m, r in rows] if balanced else rows


def _balance(rows: Tensor) -> Tensor:
    length = rows.square().sum(1).mean().sqrt()
    return rows / torch.where(length > 0, length, 1.0)


def channel_features(
    group: ChannelGroup, weights: Mapping[str, Tensor], *, raw: bool = False, balanced: bool = False
) -> Tensor:
    r"""Describe each channel by one row: its producer rows, its kernels and its consumer columns, concatenated.

    x_c = [W_p[c, :], W_f[:, c], ...] over all members of the group, in execution order.

    Args:
        weights, raw, balanced: as for `describing_rows`.
    Returns:
        (n, d) float64.
    Raises:
        ModelError: no member of the group weighs its channels.
    Reference: Theus et al. 2024, Algorithm 2.
    """
    rows = describing_rows(group, weights, raw=raw, balanced=balanced)
    return torch.cat([own for _, own in rows], dim=1)


def channel_biases(group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """What is added to each channel, (n, k) float64; k = 0 for a group without biases.

    With norms folded this is the bias of the folded layer; a bias that folding set to zero counts for nothing.
    """
    rows = [channel_rows(weights, m) for m in group.members if Role.SHIFTS in m.roles and not weighs(m, weights)]
    return torch.cat(rows, dim=1) if rows else torch.zeros(group.size, 0, dtype=torch.float64)
