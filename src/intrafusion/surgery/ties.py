"""What holds the width of heads, and what to say of heads that stay; see `widths` for those that are cut alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Role
from intrafusion.names import plain_name
from intrafusion.surgery.expect import lies_in
from intrafusion.surgery.numbers import find_numbers
from intrafusion.surgery.scopes import find_scope, is_inside


def list_holders(model: nn.Module, size: int, scope: str) -> list[str]:
    """Attributes of a module, and of those in it, that hold this number."""
    modules = ((name, module) for name, module in model.named_modules() if is_inside(name, scope))
    found = ((name, place, n) for name, module in modules for place, n in find_numbers(module).items())
    return [f"{name}.{place}".lstrip(".") for name, place, n in found if n == size]


def explain_shared_width(group: ChannelGroup, graph: ChannelGraph, model: nn.Module) -> str:
    """What to say where channels of heads cannot be cut alone: whose width the number that holds theirs is, too.

    Values and the queries and keys that a rotary embedding turns, which lose no channels, may take it from one number.
    """
    own = list_tensors([group])
    blocks = [g for g in graph.groups if not g.is_channel and own & list_tensors([g])]
    others = {
        m.tensor
        for b in blocks
        for m in b.with_role(Role.PRODUCES, Role.MATCHES)
        if m.tensor not in own and m.positions.shape[1] % group.size == 0 and not m.tensor.endswith("bias")
    }
    kept = {t: g.reason for g in graph.groups if g.reason for t in sorted(others & list_tensors([g]))}
    holders = list_holders(model, group.size, find_scope(sorted({t.rpartition(".")[0] for t in own | kept.keys()})))
    if not kept or not holders:
        return ""
    layers = " and ".join(sorted({plain_name(t).rpartition(".")[0] for t in kept}))
    return f"{min(holders, key=len)} is the width of {layers} too, which stay: {next(iter(kept.values()))}; "


def offer_blocks(group: ChannelGroup, graph: ChannelGraph) -> str:
    """What to say where channels of heads stay: whether whole heads may go instead, which happens only if asked for."""
    whole = [b for b in graph.groups if not b.is_channel and b.reducible and lies_in(group, b)]
    return "; whole heads or groups may go instead: keep={'*:blocks': 0.5}" if whole else ""


def list_tensors(groups: Sequence[ChannelGroup]) -> set[str]:
    """What computes the channels."""
    return {m.tensor for g in groups for m in g.with_role(Role.PRODUCES, Role.MATCHES)}
