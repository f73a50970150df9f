"""The vector that describes each channel of a group: everything that comes in and everything that goes out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGroup, Member, Role


def channel_rows(weights: Mapping[str, Tensor], member: Member) -> Tensor:
    """One row per channel: all entries of the member's tensor that belong to it, over its slots and other dimensions.

    Returns:
        (n, d) float64, d = slots * (size of the other dimensions, inside `within` where the member has one).
    """
    tensor = weights[member.tensor]
    positions = torch.as_tensor(member.positions, dtype=torch.long, device=tensor.device)
    if member.within is not None and member.within.dim != member.dim:
        tensor = tensor.narrow(member.within.dim, member.within.start, member.within.stop - member.within.start)
    return tensor.detach().movedim(member.dim, 0)[positions].flatten(1).double()


def linear_rows(group: ChannelGroup, weights: Mapping[str, Tensor], *, bias: bool) -> list[Tensor]:
    """The rows of every member that weighs channels, in execution order: one (n, d) matrix per member.

    These are producers, consumers and depthwise kernels, and the biases if asked. Scales and statistics of norms are
    left out: where a norm can be folded they say nothing, elsewhere they are no part of a linear map.
    """
    return [rows for member in group.members if (rows := _rows_of(member, weights, bias)) is not None]


def features(group: ChannelGroup, weights: Mapping[str, Tensor], *, bias: bool = True) -> Tensor:
    r"""Describe each channel by one row: its producer rows, its biases and its consumer columns, concatenated.

    x_c = [W_p[c, :], b_p[c], W_f[:, c], ...] over all members of the group.

    Args:
        weights: tensors by name, norms folded (`intrafusion.norms.fold`).
        bias: include what is added to the channels; the paper says yes, its released code leaves it out.
    Returns:
        (n, d) float64.
    Raises:
        ModelError: no member of the group weighs its channels.
    Reference: Theus et al. 2024, Algorithm 2.
    """
    rows = linear_rows(group, weights, bias=bias)
    if not rows:
        raise ModelError(f"group {group.name!r}: no weight describes its channels; exclude the group.")
    return torch.cat(rows, dim=1)


def leave_out(group: ChannelGroup, tensors: Collection[str]) -> ChannelGroup:
    """The group without the members whose tensor matches a name or shell pattern, such as ("fc.*",).

    Features and importance computed on the result do not look at these tensors; the maps still apply to them.
    """
    kept = (m for m in group.members if not any(fnmatchcase(m.tensor, pattern) for pattern in tensors))
    return replace(group, members=tuple(kept))


def _rows_of(member: Member, weights: Mapping[str, Tensor], bias: bool) -> Tensor | None:
    linear = member.roles & {Role.PRODUCES, Role.CONSUMES}
    kernel = Role.SCALES in member.roles and weights[member.tensor].dim() > 1
    if linear or kernel or (bias and Role.SHIFTS in member.roles):
        return channel_rows(weights, member)
    return None
