"""Heads whose queries, keys and values take their width from one number: they are cut alike, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Role, families_of
from intrafusion.surgery.numbers import find_numbers


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
    scope = _find_scope([m for g in heads for m in g.producers])
    inside = all(any(_is_in(p, scope) for p in g.producers) for g in values)
    return inside and any(
        heads[0].size in find_numbers(module).values() for name, module in model.named_modules() if _is_in(name, scope)
    )


def _list_tensors(groups: Sequence[ChannelGroup]) -> set[str]:
    """What computes the channels."""
    return {m.tensor for g in groups for m in g.with_role(Role.PRODUCES, Role.MATCHES)}


def _find_scope(modules: Sequence[str]) -> str:
    """The smallest module around several; of a single one, that in which it lies."""
    paths = [m.split(".") for m in dict.fromkeys(modules)]
    if len(paths) == 1:
        return ".".join(paths[0][:-1])
    shared = 0
    while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def _is_in(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(f"{scope}.")
