"""Every network of the gallery: what the tracer says of its channels is true, and it says what was found by hand."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from breadth import EXHAUSTIVE
from gallery import CASES, Case, Inputs
from gallery.wirings import random_network
from torch import nn

from intrafusion.graph import SHARING, ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.inputs import Inputs as Call
from intrafusion.surgery.permute import verify_groups
from intrafusion.trace import trace

EXACT = 1e-9  # largest relative error of what must be equal in float64
CHANGED = 1e-7  # smallest relative change of what must differ
NOT_YET = "cannot be reduced yet"  # interchangeable channels that the surgery does not support

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


@dataclass(frozen=True, eq=False)
class Traced:
    """A case with random weights, its graph, and the same network and inputs in float64."""

    case: Case
    graph: ChannelGraph
    model: nn.Module
    inputs: list[Inputs]

    def groups(self, kind: str) -> list[ChannelGroup]:
        return [g for g in self.graph.groups if g.kind == kind and interchangeable(g)]


def interchangeable(group: ChannelGroup) -> bool:
    return group.size > 1 and (group.reason is None or NOT_YET in group.reason)


@functools.cache
def traced(case: Case) -> Traced:
    model, inputs = case.build()
    graph = trace(oracle.randomise_(model), inputs)
    probes = [inputs] if case.probe is None else [inputs, case.probe()]
    return Traced(case, graph, oracle.double_copy(model), [oracle.double(p) for p in probes])


@functools.cache
def duplicate_errors(case: Case) -> dict[str, tuple[float, float]]:
    """By group that is not marked as unmixable."""
    found = traced(case)
    mixable = [group for group in found.groups("channel") if group.unmixable is None]
    return {g.name: oracle.duplicate_errors(found.model, found.inputs[0], g) for g in mixable}


every_case = pytest.mark.parametrize("case", CASES, ids=str, scope="module")  # all tests of a case in a row


# ---- interchangeable means interchangeable --------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("kind", ["channel", "block"])
def test_permuting_all_groups_changes_nothing(case: Case, kind: str) -> None:
    found = traced(case)
    for inputs in found.inputs:
        assert oracle.permutation_error(found.model, inputs, found.groups(kind)) <= EXACT


@every_case
def test_leaving_one_member_out_changes_the_output(case: Case) -> None:
    """The negative control: without it the check above proves nothing."""
    found = traced(case)
    for group in [*found.groups("channel"), *found.groups("block")]:
        for member in group.members if len(group.members) > 1 else ():
            assert misses(found, group, member), f"{group.name}: {member.tensor} can be left unpermuted"


def misses(found: Traced, group: ChannelGroup, member: Member) -> bool:
    """Whether the output notices that a member was left out, or could not notice because the member never matters."""
    if any(oracle.control(found.model, inputs, group, member) > CHANGED for inputs in found.inputs):
        return True
    return all(oracle.influence(found.model, inputs, member) <= EXACT for inputs in found.inputs)


@every_case
def test_exact_duplicates_merge(case: Case) -> None:
    for name, (merged, _) in duplicate_errors(case).items():
        assert merged <= EXACT, f"{name} is not marked as unmixable"


@every_case
def test_nothing_else_reads_a_merged_channel(case: Case) -> None:
    """Where no softmax, norm or product is noted, a channel without consumers is dead."""
    found = traced(case)
    for group in found.groups("channel"):
        if group.unmixable is None and not group.notes:
            _, disturbed = duplicate_errors(case)[group.name]
            assert disturbed <= EXACT, f"{group.name} is read by something that is not noted"


# ---- what was found by hand -----------------------------------------------------------------------------------------


def covers(names: tuple[str, ...], producers: Iterable[str]) -> bool:
    """Every producer lies under one of the names, and every name has a producer."""
    producers = [p for p in producers if p]
    under = {n: [p for p in producers if p == n or p.startswith(n + ".")] for n in names}
    return all(under.values()) and all(any(p in ps for ps in under.values()) for p in producers)


def sorted_by_hand(groups: Iterable[ChannelGroup], expected: Iterable[str]) -> tuple[dict[str, list[int]], list[str]]:
    """Sizes of the groups under each expected name (the longest that fits), and the groups under none."""
    sizes, rest = defaultdict(list), []
    by_length = sorted(expected, key=len, reverse=True)
    for group in groups:
        name = next((e for e in by_length if covers(tuple(e.split()), group.producers)), None)
        if name is None:
            rest.append(f"{' '.join(group.producers)}: {group.size}")
        else:
            sizes[name].append(group.size)
    return sizes, rest


def as_lists(sizes: Mapping[str, int | tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: sorted([size] if isinstance(size, int) else size) for name, size in sizes.items()}


@every_case
def test_groups_are_those_found_by_hand(case: Case) -> None:
    found, expect = traced(case), case.expect
    sizes, rest = sorted_by_hand(found.groups("channel"), expect.groups)
    assert {name: sorted(n) for name, n in sizes.items()} == as_lists(expect.groups)
    assert not (expect.complete and rest)


@pytest.mark.parametrize("case", [c for c in CASES if c.expect.blocks], ids=str)
def test_blocks_are_those_found_by_hand(case: Case) -> None:
    sizes, _ = sorted_by_hand(traced(case).groups("block"), case.expect.blocks)
    assert {name: sorted(n) for name, n in sizes.items()} == as_lists(case.expect.blocks)


@pytest.mark.parametrize("case", [c for c in CASES if c.expect.blocked], ids=str)
def test_blocked_channels_say_why(case: Case) -> None:
    for module, why in case.expect.blocked.items():
        groups = [g for g in traced(case).graph.groups if g.is_channel and produced_by(module, g)]
        assert all(g.reason is not None for g in groups), f"{module} may not be reduced"
        assert all(why in (g.reason or "") for g in groups if g.size > 1)
        assert groups, f"{module} is in no group"


def produced_by(module: str, group: ChannelGroup) -> bool:
    return any(p == module or p.startswith(module + ".") for p in group.producers)


@pytest.mark.parametrize("case", [c for c in CASES if c.expect.unmixable], ids=str)
def test_unmixable_groups_are_marked(case: Case) -> None:
    for names in case.expect.unmixable:
        groups = [g for g in traced(case).groups("channel") if covers(tuple(names.split()), g.producers)]
        assert groups
        assert all(g.unmixable for g in groups)


@pytest.mark.parametrize("case", [c for c in CASES if c.expect.warns], ids=str)
def test_warnings(case: Case) -> None:
    assert any(case.expect.warns in w for w in traced(case).graph.warnings)


# ---- a graph is consistent ------------------------------------------------------------------------------------------


@every_case
def test_members_fit_their_tensors(case: Case) -> None:
    found = traced(case)
    shapes = {name: tuple(t.shape) for name, t in oracle.tensors_of(found.model)}
    assert found.graph.shapes.items() <= shapes.items()
    for group in found.graph.groups:
        assert group.members
        for m in group.members:
            stop = shapes[m.tensor][m.dim]
            assert m.positions.ndim == 2
            assert len(m.positions) == group.size
            assert m.positions.min() >= 0
            assert m.positions.max() < stop
            assert len(np.unique(m.positions)) == m.positions.size


@every_case
def test_an_index_is_in_one_channel_group(case: Case) -> None:
    owners: dict[tuple[Any, int], str] = {}
    for group in traced(case).graph.groups:
        for m in group.members if group.is_channel else ():
            for position in m.positions.ravel().tolist():
                owner = owners.setdefault((m.key(), position), group.name)
                assert owner == group.name, f"index {position} of {m.tensor} is in {owner} and in {group.name}"
    whole = {key[0][:2] for key in owners if key[0][2] is None}
    parts = {key[0][:2] for key in owners if key[0][2] is not None}
    assert not whole & parts


@every_case
def test_names_and_depths(case: Case) -> None:
    graph = traced(case).graph
    names = [g.name for g in graph.groups]
    assert len(set(names)) == len(names)
    counted = [g.depth for g in graph.groups if g.reason is None and g.is_channel]
    assert set(counted) == set(range(len(counted)))
    assert {g.depth for g in graph.groups if g.reason is not None} <= {None}


@every_case
def test_twins_have_one_size(case: Case) -> None:
    sizes = defaultdict(set)
    for group in traced(case).graph.reducible:
        if group.is_channel:
            sizes[group.family].add(group.size)
    assert all(len(s) == 1 for s in sizes.values())


@pytest.mark.slow
@pytest.mark.exhaustive
@every_case
def test_values_of_weights_do_not_matter(case: Case) -> None:
    """Freshly initialised (ones, zeros, equal entries) and randomised weights give the same graph."""
    model, inputs = case.build()
    assert described(trace(model, inputs)) == described(traced(case).graph)


def described(graph: ChannelGraph) -> list[object]:
    def member(m: Member) -> object:
        return m.key(), sorted(m.roles), m.positions.tolist()

    return [(g.name, g.kind, g.reason, g.unmixable, [member(m) for m in g.members]) for g in graph.groups]


# ---- networks that nobody thought of --------------------------------------------------------------------------------


# Seeds that gave a wrong group at some time.
WRONG_ONCE = [202, 234, 244, 354, 380, 381, 767, 1437, 1771, 1848, 1945, 2137, 11445, 11679, 11795]
WRONG_ONCE += [20072, 20221, 20229, 20789, 20800, 21219, 21348, 23027, 31363, 31785, 40269, 40418, 40685, 40696, 41313]
WRONG_ONCE += [6577, 50041, 50317, 50823, 100408, 201145, 201638, 305152]


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(k, marks=EXHAUSTIVE) for k in range(20, 60)), *WRONG_ONCE])
def test_random_wirings(seed: int) -> None:
    model, x, _ = random_network(seed)
    graph = trace(oracle.randomise_(model), x)
    proved = verify_groups(model, graph, Call.of(x))
    model, x = copy.deepcopy(model).double(), x.double()
    for group in filter(interchangeable, graph.groups):
        if SHARING in group.name:  # what order blocks share others in is a guess, which the proof decides on
            group = next(g for g in proved.groups if g.name == group.name)
            assert group.reason is not None or oracle.permutation_error(model, x, [group]) <= EXACT, group.name
            continue
        assert oracle.permutation_error(model, x, [group]) <= EXACT, f"{group.kind} {group.name}"
        if group.is_channel and group.unmixable is None:
            merged, disturbed = oracle.duplicate_errors(model, x, group)
            assert merged <= EXACT, f"{group.name} is not marked as unmixable"
            assert group.notes or disturbed <= EXACT, f"{group.name} is read by something that is not noted"


# ---- the judge itself -----------------------------------------------------------------------------------------------


def hand_made_group(consumer_order: list[int]) -> tuple[nn.Module, torch.Tensor, ChannelGroup]:
    """linear(3, 4) -> relu -> linear(4, 2) and a group that claims the consumer reads channels in the given order."""
    model = oracle.randomise_(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).double()
    column = np.arange(4)[:, None]
    members = (
        Member("0.weight", 0, column, frozenset({Role.PRODUCES})),
        Member("0.bias", 0, column, frozenset({Role.SHIFTS})),
        Member("2.weight", 1, np.array(consumer_order)[:, None], frozenset({Role.CONSUMES})),
    )
    return model, torch.randn(8, 3).double(), ChannelGroup("0", 4, members)


def test_the_oracle_accepts_a_true_group() -> None:
    model, x, group = hand_made_group([0, 1, 2, 3])
    before = copy.deepcopy(model.state_dict())
    assert oracle.permutation_error(model, x, [group]) <= 1e-15
    assert min(oracle.control(model, x, group, m) for m in group.members) > 1e-2
    assert max(oracle.duplicate_errors(model, x, group)) <= 1e-15
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_oracle_rejects_a_false_group() -> None:
    model, x, group = hand_made_group([1, 0, 2, 3])
    assert oracle.permutation_error(model, x, [group]) > 1e-2
    assert max(oracle.duplicate_errors(model, x, group)) > 1e-2


def test_the_oracle_knows_what_a_member_does() -> None:
    """The bias of a layer before an instance norm has no influence; the weight has."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    oracle.randomise_(model).double()
    x = torch.randn(2, 2, 4, 4).double()
    column = np.arange(4)[:, None]
    assert oracle.influence(model, x, Member("0.bias", 0, column, frozenset({Role.SHIFTS}))) <= EXACT
    assert oracle.influence(model, x, Member("0.weight", 0, column, frozenset({Role.PRODUCES}))) > 1e-2
