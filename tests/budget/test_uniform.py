from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from intrafusion.budget import uniform_sizes
from intrafusion.errors import BudgetError
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role

FAMILIES = itertools.count(100)


def group(name: str, size: int, family: int | None = None, producers: tuple[str, ...] = ()) -> ChannelGroup:
    """A group of its own family unless one is given."""
    each = np.arange(size)[:, None]
    members = tuple(Member(f"{p}.weight", 0, each, frozenset({Role.PRODUCES})) for p in producers or (name,))
    return ChannelGroup(name, size, members, family=next(FAMILIES) if family is None else family)


def kept(keep: Any, *groups: ChannelGroup, round_to: int | None = None) -> list[int]:
    return list(uniform_sizes(groups, keep, ChannelGraph(groups), round_to=round_to).values())


@pytest.mark.parametrize(
    ("n", "keep", "m"),
    [(10, 0.7, 7), (10, 0.79, 7), (3, 0.5, 1), (64, 0.3, 19), (5, 1e-9, 1), (1, 0.5, 1), (10, 1, 10), (10, 0.999, 9)],
)
def test_floor_and_at_least_one(n: int, keep: float, m: int) -> None:
    assert kept(keep, group("a", n)) == [m]


def test_decimal_fractions_are_not_cut_by_rounding_errors() -> None:
    """0.7 * 10 = 7 and 0.29 * 100 = 29 also where the floating-point product lies just below."""
    assert 100 * 0.29 < 29
    assert kept(0.29, group("a", 100)) == [29]
    for n in (*range(1, 25), 50, 99, 100, 101, 199, 200, 250, 300):
        for percent in range(1, 101):
            assert kept(percent / 100, group("a", n)) == [max(1, n * percent // 100)]


@pytest.mark.parametrize(
    ("n", "keep", "multiple", "m"),
    [(64, 0.7, 8, 48), (64, 0.69, 8, 48), (64, 0.68, 8, 40), (64, 0.5, 8, 32), (64, 0.01, 8, 8), (6, 0.5, 8, 6),
     (20, 0.9, 8, 16), (20, 0.99, 8, 16), (23, 0.99, 8, 23), (64, 0.5625, 8, 40), (10, 0.33, 1, 3), (20, 1.0, 8, 20)],
)  # fmt: skip
def test_round_to_the_nearest_multiple_never_below_one_and_never_above_n(
    n: int, keep: float, multiple: int, m: int
) -> None:
    assert kept(keep, group("a", n), round_to=multiple) == [m]


@pytest.mark.parametrize(
    ("keep", "round_to", "sizes"),
    [(0.75, None, [28, 7]), (0.5, None, [20, 5]), (0.99, None, [36, 9]), (0.01, None, [4, 1]), (1, None, [40, 10]),
     (0.75, 2, [32, 8]), (0.5, 8, [32, 8]), (0.99, 8, [40, 10]),
     ({"head": 0.2, "stream": 0.75}, None, [28, 7]), ({"head": 0.8, "stream": 0.1}, None, [32, 8]),
     ({"head": 0.5}, None, [40, 10]), ({"stream": 0.75, "head": 0.2}, 4, [32, 8])],
)  # fmt: skip
def test_a_stream_and_its_heads_keep_what_is_a_whole_number_in_each(
    keep: Any, round_to: int | None, sizes: list[int]
) -> None:
    family = next(FAMILIES)
    stream, head = replace(group("stream", 40, family), multiple=4), group("head", 10, family)
    assert kept(keep, stream, head, round_to=round_to) == sizes


def test_the_first_pattern_that_matches_counts() -> None:
    groups = [group("layer1.conv1", 10), group("layer1.conv2", 10), group("layer2.conv1", 10), group("stem", 10)]
    assert kept({"layer1.conv2": 0.9, "layer1.*": 0.5, "*conv*": 0.2}, *groups) == [5, 9, 2, 10]
    assert kept({"*": 0.5, "stem": 0.1}, *groups) == [5, 5, 5, 5]


def test_a_pattern_means_every_layer_that_produces_the_group() -> None:
    assert kept({"block.conv2": 0.5}, group("stem", 8, producers=("stem", "block.conv2")), group("x", 8)) == [4, 8]


def test_twins_get_the_larger_size() -> None:
    pair = group("g#0", 10, family=1), group("g#1", 10, family=1)
    assert kept({"g#0": 0.3, "g#1": 0.6}, *pair, group("other", 10, family=2)) == [6, 6, 10]
    assert kept({"g#1": 0.6}, *pair) == [10, 10]


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -0.1, math.nan, math.inf, True, False, "0.5", None])
def test_fractions_outside_of_0_1(keep: Any) -> None:
    with pytest.raises(
        BudgetError, match=r"keep: expected a fraction in \(0, 1\], got .*; 0.7 keeps 70 % of the channels"
    ):
        kept(keep, group("a", 4))
    with pytest.raises(BudgetError, match=r"keep\['a'\]: expected a fraction"):
        kept({"a": keep}, group("a", 4))


def test_a_pattern_that_matches_nothing_suggests_the_nearest() -> None:
    with pytest.raises(BudgetError, match="keep: unknown group 'layer1.con1'. Did you mean 'layer1.conv1'"):
        kept({"layer1.con1": 0.5}, group("layer1.conv1", 4), group("head", 4))


def test_a_pattern_may_name_a_group_that_is_not_reduced() -> None:
    a, head = group("a", 4), group("head", 4)
    assert uniform_sizes([a], {"head": 0.5, "a": 0.5}, ChannelGraph((a, head))) == {"a": 2}


@pytest.mark.parametrize("multiple", [0, -8, 2.5, "8", True])
def test_round_to_is_a_whole_number(multiple: Any) -> None:
    with pytest.raises(BudgetError, match="round_to: expected a whole number >= 1, got"):
        kept(0.5, group("a", 4), round_to=multiple)
