"""What a graph says of its groups."""

from __future__ import annotations

from intrafusion import ChannelGraph, ChannelGroup


def test_predicates_of_groups() -> None:
    plain, pinned = ChannelGroup("plain", 2, ()), ChannelGroup("pinned", 2, (), reason="a softmax reads their order")
    block = ChannelGroup("heads", 2, (), kind="block")
    assert [(g.is_channel, g.reducible) for g in (plain, pinned, block)] == [(True, True), (True, False), (False, True)]
    assert ChannelGraph((plain, pinned, block)).reducible == (plain, block)
