"""Channels that one width ties to each other: cut alike, or in step, or not at all.

Queries, keys and values whose heads take their width from one number; streams that must be as wide as all heads
together. Neither can be seen in the weights, so networks in which one of them is smaller are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph, ChannelGroup, Role, families_of
from intrafusion.network.inputs import Inputs
from intrafusion.reduce.select import selection_map
from intrafusion.surgery.literals import Literals
from intrafusion.surgery.operate import copy_reduced
from intrafusion.surgery.scopes import find_scope, is_inside
from intrafusion.surgery.ties import list_holders, list_tensors


def tie_widths(graph: ChannelGraph, model: nn.Module, inputs: Inputs) -> ChannelGraph:
    """The graph, in which groups of one width are of one family, as far as the network needs that.

    Heads: where one layer computes queries, keys and values, or where a module around them holds their width as a
    number, as `head_dim`, with which neither goes alone. Streams: `nn.MultiheadAttention` asks for the width of all
    heads together, and so does a `reshape(x.shape)` behind any attention.
    """
    trial = _Trial(graph, model, Literals(model, graph, inputs))
    return _tie_streams(_tie_heads(graph, trial), trial)


# ---- heads ----------------------------------------------------------------------------------------------------------


def _tie_heads(graph: ChannelGraph, trial: _Trial) -> ChannelGraph:
    """Queries and keys are twins of the values that must have the same width."""
    families = families_of(g for g in graph.groups if g.is_channel and g.reducible)
    joined: dict[int, int] = {}
    for heads in families:
        if any(g.with_role(Role.MATCHES) for g in heads):
            for values in families:
                if values is not heads and _share_width(heads, values, trial):
                    joined[values[0].family] = heads[0].family
    return replace(graph, groups=tuple(replace(g, family=joined.get(g.family, g.family)) for g in graph.groups))


def _share_width(heads: Sequence[ChannelGroup], values: Sequence[ChannelGroup], trial: _Trial) -> bool:
    if heads[0].size != values[0].size or any(g.with_role(Role.MATCHES) for g in values):
        return False
    if list_tensors(heads) & list_tensors(values):
        return True
    scope = find_scope(m for g in heads for m in g.producers)
    inside = all(any(is_inside(p, scope) for p in g.producers) for g in values)
    return inside and bool(list_holders(trial.model, heads[0].size, scope)) and not trial.go_apart(heads, values, scope)


# ---- streams --------------------------------------------------------------------------------------------------------


def _tie_streams(graph: ChannelGraph, trial: _Trial) -> ChannelGraph:
    """Streams are in one family with the heads of which they must be a multiple, with which they are cut in step."""
    groups = {g.name: g for g in graph.groups}
    for stream, heads in _find_candidates(graph):
        if trial.needs_both(stream, heads):
            groups |= {g.name: g for g in _tie(groups[stream.name], [groups[g.name] for g in heads])}
    return replace(graph, groups=tuple(groups.values()))


def _find_candidates(graph: ChannelGraph) -> Iterator[tuple[ChannelGroup, list[ChannelGroup]]]:
    """Each group whose size is a multiple of the size of heads that read or write it, with all these heads."""
    families = families_of(g for g in graph.reducible if g.is_channel)
    queries = [f for f in families if any(g.with_role(Role.MATCHES) for g in f) and f[0].size > 1]
    heads = [[g for values in families if _are_one(f, values) for g in values] for f in queries]
    taken = {g.name for family in heads for g in family}
    for stream in (g for f in families if len(f) == 1 for g in f if g.name not in taken):
        modules = {m.module for m in stream.members}
        near = [f for f in heads if modules & {m.module for g in f for m in g.members}]
        found = [g for f in near if stream.size % f[0].size == 0 for g in f]
        if found:
            yield stream, found


def _are_one(heads: Sequence[ChannelGroup], others: Sequence[ChannelGroup]) -> bool:
    """Whether groups are these queries and keys, or the values of the same attention, as wide and as many."""
    if others is heads:
        return True
    scope = find_scope(m for g in heads for m in g.producers)
    alike = heads[0].size == others[0].size and len(heads) == len(others)
    matched = any(g.with_role(Role.MATCHES) for g in others)
    return alike and not matched and all(is_inside(p, scope) for g in others for p in g.producers)


def _find_step(stream: ChannelGroup, heads: Sequence[ChannelGroup]) -> int:
    """Channels of the stream that go with the least number of channels of every head."""
    return math.lcm(*(stream.size // g.size for g in heads))


def _tie(stream: ChannelGroup, heads: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The same groups as one family."""
    least = stream.size // _find_step(stream, heads)
    alike = lambda g: replace(g, family=heads[0].family, multiple=g.size // least)  # noqa: E731
    layers = ", ".join(dict.fromkeys(p for g in heads for p in g.producers))
    note = f"as wide as all heads of {layers} together, and cut in step with them"
    return [replace(alike(stream), notes=(*stream.notes, note)), *map(alike, heads)]


# ---- networks that are tried ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Trial:
    """Networks in which some groups are smaller, that are only run, with numbers in attributes that follow.

    Attributes:
        apart: whether heads of a size in modules of a class were cut without their values, by these.
    """

    graph: ChannelGraph
    model: nn.Module
    literals: Literals
    apart: dict[tuple[type, int, int], bool] = field(default_factory=dict)

    __repr__ = show_briefly

    def go_apart(self, heads: Sequence[ChannelGroup], values: Sequence[ChannelGroup], scope: str) -> bool:
        """Whether queries and keys run without their values being as narrow, and the other way round."""
        kind = type(self.model.get_submodule(scope)), heads[0].size, len(heads)
        if kind not in self.apart:
            narrowed = ({g.name: g.size - 1 for g in groups} for groups in (heads, values))
            self.apart[kind] = heads[0].size > 1 and all(self.runs(sizes) for sizes in narrowed)
        return self.apart[kind]

    def needs_both(self, stream: ChannelGroup, heads: Sequence[ChannelGroup]) -> bool:
        """Whether a stream and its heads can only be cut in step."""
        step = _find_step(stream, heads)
        narrower = {g.name: g.size - step * g.size // stream.size for g in heads}
        thinner = {stream.name: stream.size - step}
        if not thinner[stream.name] or self.runs(narrower):
            return False
        return not self.runs(thinner) and self.runs({**thinner, **narrower})

    def runs(self, sizes: Mapping[str, int]) -> bool:
        """Whether such a network gives outputs of the same shapes, if need be with numbers that follow."""
        maps = {n: selection_map(torch.arange(m), self.graph[n].size) for n, m in sizes.items()}
        return self.literals.exist(copy_reduced(self.model, self.graph, maps), sizes)
