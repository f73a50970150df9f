"""Heads whose queries, keys and values take their width from one number: they are cut alike, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Role, families_of
from intrafusion.names import plain_name
from intrafusion.surgery.expect import lies_in
from intrafusion.surgery.numbers import find_numbers
from intrafusion.surgery.scopes import find_scope, is_inside


def tie_heads(graph: ChannelGraph, model: nn.Module) -> ChannelGraph:
    """The graph, in which queries and keys are twins of the values that must have the same width.

    They must where one layer computes both, or where a module around them holds that width as a number, as `head_dim`.
    """
    families = families_of(g for g in graph.groups if g.is_channel and g.reducible)
    joined: dict[int, int] = {}
    for heads in families:
        if any(g.with_role(Role.MATCHES) for g in heads):
            for values in families:
                if values is not heads and _share_width(heads, values, model):
                    joined[values[0].family] = heads[0].family
    return replace(graph, groups=tuple(replace(g, family=joined.get(g.family, g.family)) for g in graph.groups))


def _share_width(heads: Sequence[ChannelGroup], values: Sequence[ChannelGroup], model: nn.Module) -> bool:
    if heads[0].size != values[0].size or any(g.with_role(Role.MATCHES) for g in values):
        return False
    if _list_tensors(heads) & _list_tensors(values):
        return True
    scope = find_scope(m for g in heads for m in g.producers)
    inside = all(any(is_inside(p, scope) for p in g.producers) for g in values)
    return inside and bool(_list_holders(model, heads[0].size, scope))


def _list_holders(model: nn.Module, size: int, scope: str) -> list[str]:
    """Attributes of a module, and of those in it, that hold this number."""
    modules = ((name, module) for name, module in model.named_modules() if is_inside(name, scope))
    found = ((name, place, n) for name, module in modules for place, n in find_numbers(module).items())
    return [f"{name}.{place}".lstrip(".") for name, place, n in found if n == size]


def explain_shared_width(group: ChannelGroup, graph: ChannelGraph, model: nn.Module) -> str:
    """What to say where channels of heads cannot be cut alone: whose width the number that holds theirs is, too.

    Values and the queries and keys that a rotary embedding turns, which lose no channels, may take it from one number.
    """
    own = _list_tensors([group])
    blocks = [g for g in graph.groups if not g.is_channel and own & _list_tensors([g])]
    others = {
        m.tensor
        for b in blocks
        for m in b.with_role(Role.PRODUCES, Role.MATCHES)
        if m.tensor not in own and m.positions.shape[1] % group.size == 0 and not m.tensor.endswith("bias")
    }
    kept = {t: g.reason for g in graph.groups if g.reason for t in sorted(others & _list_tensors([g]))}
    holders = _list_holders(model, group.size, find_scope(sorted({t.rpartition(".")[0] for t in own | kept.keys()})))
    if not kept or not holders:
        return ""
    layers = " and ".join(sorted({plain_name(t).rpartition(".")[0] for t in kept}))
    return f"{min(holders, key=len)} is the width of {layers} too, which stay: {next(iter(kept.values()))}; "


def offer_blocks(group: ChannelGroup, graph: ChannelGraph) -> str:
    """What to say where channels of heads stay: whether whole heads may go instead, which happens only if asked for."""
    whole = [b for b in graph.groups if not b.is_channel and b.reducible and lies_in(group, b)]
    return "; whole heads or groups may go instead: keep={'*:blocks': 0.5}" if whole else ""


def _list_tensors(groups: Sequence[ChannelGroup]) -> set[str]:
    """What computes the channels."""
    return {m.tensor for g in groups for m in g.with_role(Role.PRODUCES, Role.MATCHES)}
