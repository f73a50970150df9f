"""Random networks: channels that cannot matter are removed, copies merged, and nothing may change.

What must come out is computed from the network itself, by zeroing and copying entries of its weights, in float64. Which
channels are dead, or merge exactly, is found out by disturbing them: exact zeros, not what the tracer noted.
The networks of a plain run are few and hold every block twice; `INTRAFUSION_FUZZ=20` tries 20 x 152; with `-s` the
counts are shown.
"""

from __future__ import annotations

import copy
import os
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gallery.compositions import KINDS, LEAVING, Composition, compose
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed, ModelError, Recipe
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role, families_of

TIMES = int(os.environ.get("INTRAFUSION_FUZZ", "0"))
CHUNKS = 4
FEW = (
    *(3, 7, 11, 14, 18, 20, 37, 39, 46, 55, 58, 71, 72, 75, 78, 80, 84, 89, 90, 91, 92, 93, 97, 104, 111, 113, 116),
    *(122, 146),
)
SEEDS = range(152 * TIMES) if TIMES else FEW
EXACT = 1e-9  # largest relative error of what must be equal in float64
KEEP = 0.5
CARRIES = {Role.PRODUCES, Role.SHIFTS, Role.MEAN}
MIXERS = ("fold", "pivot", "intrafusion")

Kept = dict[str, Tensor]
"""Which channels of each group stay, ascending, by its name."""


class Wrong(AssertionError):
    """The library did something else than it said."""


# ---- what networks say, and what they hold ---------------------------------------------------------------------------


def leaves(found: Any) -> list[Tensor]:
    """Every tensor of an output, in order, dataclasses opened."""
    if isinstance(found, Tensor):
        return [found]
    if is_dataclass(found):
        found = [getattr(found, f.name) for f in fields(found)]
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [leaf for item in inside for leaf in leaves(item)]


@torch.no_grad()
def say(model: nn.Module, case: Composition) -> list[Tensor]:
    """What a network makes of the input it was traced with, and of another."""
    return [leaf for inputs in (case.inputs, case.probe) for leaf in leaves(model(*inputs))]


def difference(model: nn.Module, case: Composition, expected: list[Tensor]) -> float:
    found = say(model, case)
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise Wrong(f"shapes {[list(x.shape) for x in found]} instead of {[list(x.shape) for x in expected]}")
    return oracle.relative_difference(found, expected)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(oracle.tensors_of(model))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in oracle.tensors_of(model)}


def must_be(model: nn.Module, saved: dict[str, Tensor], what: str) -> None:
    found = tensors(model)
    different = [n for n in saved.keys() | found.keys() if n not in saved.keys() & found.keys()]
    different += [n for n in saved.keys() & found.keys() if not torch.equal(saved[n], found[n])]
    if different:
        raise Wrong(f"{what}: {different}")


# ---- dead channels ---------------------------------------------------------------------------------------------------


def fill(model: nn.Module, member: Member, channels: Tensor, value: float | Callable[[Tensor], Tensor]) -> None:
    """Set these channels of a member to a value, or to what a function makes of them (in place)."""
    tensor, index = oracle.view_of(model, member), torch.from_numpy(member.positions)[channels].reshape(-1)
    if not callable(value):
        tensor.index_fill_(member.dim, index, value)
    else:
        tensor.index_copy_(member.dim, index, value(tensor.index_select(member.dim, index)))


def is_direction(member: Member) -> bool:
    """The direction of a weight that is kept apart from its length; a row of it that is zero has none."""
    return member.tensor.endswith("parametrizations.weight.original1")


def is_source(member: Member) -> bool:
    """Whether zeros in it silence a channel: what makes or shifts it, or the length of the weight that does."""
    if member.tensor.endswith("parametrizations.weight.original0"):
        return True
    return bool(member.roles & CARRIES) and not is_direction(member)


def silence(model: nn.Module, groups: Iterable[ChannelGroup], kept: Kept, *, by_hook: bool = False) -> None:
    """Nothing is made of the channels that do not stay, and nothing is read of them (in place).

    Args:
        by_hook: readers whose weight has a length of its own get zeros instead, and keep that length.
    """
    for group in groups:
        gone = others(group, kept)
        for member in group.members:
            if Role.CONSUMES in member.roles and is_direction(member) and by_hook:
                mute(model, member, gone)
            elif (
                Role.CONSUMES in member.roles
                or (member.roles & CARRIES and not is_direction(member))
                or member.tensor.endswith("parametrizations.weight.original0")
            ):
                fill(model, member, gone, 0.0)


def others(group: ChannelGroup, kept: Kept) -> Tensor:
    gone = torch.ones(group.size, dtype=torch.bool)
    gone[kept[group.name]] = False
    return gone.nonzero().flatten()


def mute(model: nn.Module, member: Member, channels: Tensor) -> None:
    """A reader sees zeros in the place of these channels."""
    module = model.get_submodule(member.module.removesuffix(".parametrizations.weight"))
    index = torch.from_numpy(member.positions)[channels].reshape(-1)
    axis = -1 if isinstance(module, nn.Linear) else 1
    module.register_forward_pre_hook(lambda _, args: (args[0].index_fill(axis, index, 0.0), *args[1:]))


def is_counted(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether a norm takes statistics over these channels: those count, zero as they may be."""
    owners = [model.get_submodule(m.module) for m in group.members if m.module]
    several = any(isinstance(o, nn.GroupNorm) and o.num_groups < o.num_channels for o in owners)
    return several or any(isinstance(o, (nn.LayerNorm, nn.RMSNorm)) for o in owners)


def is_dead(model: nn.Module, case: Composition, group: ChannelGroup, gone: Tensor) -> bool:
    """Whether silenced channels may carry anything, layer by layer, and no output moves by a single bit."""
    before = say(model, case)
    carriers = [m for m in group.members if m.roles & CARRIES and Role.CONSUMES not in m.roles]
    for module in dict.fromkeys(m.module for m in carriers):
        saved = snapshot(model)
        for member in (m for m in carriers if m.module == module):
            fill(model, member, gone, lambda t: 3 * torch.randn(t.shape, dtype=t.dtype))
        moved = any(not torch.equal(a, b) for a, b in zip(say(model, case), before, strict=True))
        restore(model, saved)
        if moved:
            return False
    return True


def restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    for name, tensor in oracle.tensors_of(model):
        tensor.detach().copy_(saved[name])


def removable(case: Composition, families: Iterable[list[ChannelGroup]], kept: Kept) -> list[ChannelGroup]:
    """The groups whose silenced channels are dead, all twins of them."""
    found = []
    for family in families:
        model = copy.deepcopy(case.model)
        silence(model, family, kept)
        if not any(is_counted(model, g) for g in family) and all(
            is_dead(model, case, g, others(g, kept)) for g in family
        ):
            found += family
    return found


# ---- copies ----------------------------------------------------------------------------------------------------------


def duplicate(model: nn.Module, groups: Iterable[ChannelGroup], kept: Kept, draw: random.Random) -> dict[str, Tensor]:
    """Make every channel that does not stay a copy of one that does (in place): of which one, by name of the group."""
    origins = {}
    for group in groups:
        origin = torch.arange(group.size)
        for channel in others(group, kept).tolist():
            origin[channel] = draw.choice(kept[group.name].tolist())
            for member in group.members:
                if Role.CONSUMES not in member.roles:
                    oracle.copy_channel_(oracle.view_of(model, member), member, int(origin[channel]), channel)
        origins[group.name] = origin
    return origins


def merges(case: Composition, model: nn.Module, group: ChannelGroup, origin: Tensor) -> bool:
    """Whether readers may take the sum at the first channel and nothing at its copies, and the copies then be moved."""
    before, small = say(model, case), copy.deepcopy(model)
    copies = (origin != torch.arange(group.size)).nonzero().flatten()
    for channel in copies.tolist():
        for member in group.with_role(Role.CONSUMES):
            oracle.merge_channels_(oracle.view_of(small, member), member, int(origin[channel]), channel)
    return difference(small, case, before) <= EXACT and is_dead(small, case, group, copies)


def mergeable(case: Composition, families: Iterable[list[ChannelGroup]], kept: Kept, seed: int) -> list[ChannelGroup]:
    """The groups that may mix, and whose copies merge without a trace."""
    found = []
    for family in families:
        model = copy.deepcopy(case.model)
        origins = duplicate(model, family, kept, random.Random(seed))
        if all(g.unmixable is None and merges(case, model, g, origins[g.name]) for g in family):
            found += family
    return found


# ---- three verdicts, and a round trip --------------------------------------------------------------------------------


def without(graph: ChannelGraph, names: Iterable[str]) -> ChannelGraph:
    """The graph in which only these groups may be reduced."""
    names = set(names)
    groups = (g if g.name in names or not g.reducible else replace(g, reason="not tried") for g in graph.groups)
    return replace(graph, groups=tuple(groups))


def reduce(
    model: nn.Module, case: Composition, graph: ChannelGraph, kept: Kept, names: Sequence[str], reducer: str
) -> Compressed:
    """These groups reduced to the channels that stay, and nothing else."""

    def importance(group: ChannelGroup, weights: Any, seen: Any) -> Tensor:
        return torch.zeros(group.size).index_fill(0, kept[group.name], 1.0)

    recipe = Recipe.of(keep=KEEP, reducer=reducer, importance=importance, restore=None)
    saved, graph = snapshot(model), without(graph, names)
    plan = intrafusion.decide(model, graph, recipe, case.inputs)
    small = intrafusion.apply(model, plan, case.inputs, graph=graph)
    must_be(model, saved, "the original was changed")
    check_sizes(model, graph, small)
    return small


def check_sizes(model: nn.Module, graph: ChannelGraph, small: Compressed) -> None:
    """Every tensor is as long as the plan says: shorter by the places of the channels that went, along their axis."""
    old, new = tensors(model), tensors(small.model)
    gone: dict[tuple[int, int], dict[Any, set[int]]] = {}
    for group in graph.groups:
        for member in group.members if group.name in small.plan.sizes else ():
            lost = set(np.ravel(member.positions[small.plan.sizes[group.name] :]).tolist())
            place = id(old[member.tensor]), member.dim  # a tied weight has several names
            gone.setdefault(place, {}).setdefault(member.within, set()).update(lost)
    for name, tensor in old.items():
        lost = [max(map(len, gone.get((id(tensor), d), {0: ()}).values())) for d in range(tensor.dim())]
        expected = [n - less for n, less in zip(tensor.shape, lost, strict=True)]
        if list(new[name].shape) != expected:
            raise Wrong(f"{name} is {list(new[name].shape)}, planned was {expected}")


def must_match(small: Compressed, case: Composition, expected: list[Tensor], what: str) -> str:
    if not small.plan.sizes:
        return "refused"
    error = difference(small.model, case, expected)
    if not error <= EXACT:
        raise Wrong(f"{what}: off by {error:.1e}; {small.plan.sizes}, rolled back {dict(small.rolled_back)}")
    return "right"


def try_dead(case: Composition, graph: ChannelGraph, kept: Kept, groups: list[ChannelGroup]) -> str:
    """Dead channels go, and the network says the same."""
    dead = copy.deepcopy(case.model)
    silence(dead, groups, kept)
    small = reduce(dead, case, graph, kept, [g.name for g in groups], "select")
    return must_match(small, case, say(dead, case), "dead channels removed")


def try_zeroing(case: Composition, graph: ChannelGraph, kept: Kept, groups: list[ChannelGroup]) -> str:
    """Channels that matter go, and the network says what it says when they are zeroed."""
    small = reduce(case.model, case, graph, kept, [g.name for g in groups], "select")
    zeroed = copy.deepcopy(case.model)
    silence(zeroed, [g for g in groups if g.name in small.plan.sizes], kept, by_hook=True)
    return must_match(small, case, say(zeroed, case), "channels selected")


def try_copies(case: Composition, graph: ChannelGraph, kept: Kept, groups: list[ChannelGroup], seed: int) -> str:
    """Copies are merged, and the network says the same."""
    wide = copy.deepcopy(case.model)
    duplicate(wide, groups, kept, random.Random(seed))
    small = reduce(wide, case, graph, kept, [g.name for g in groups], MIXERS[seed % len(MIXERS)])
    return must_match(small, case, say(wide, case), f"copies merged by {MIXERS[seed % len(MIXERS)]}")


def try_round_trip(case: Composition, graph: ChannelGraph, seed: int, folder: Path) -> str:
    """Compressed as a user does, saved and loaded: the same weights to the last bit, and the same outputs."""
    reducer = ("pivot", "intrafusion", "select", "fold")[seed // 3 % 4]
    keep, saved = 0.3 + 0.5 * random.Random(seed).random(), snapshot(case.model)
    small = intrafusion.compress(case.model, case.inputs, keep, reducer=reducer, restore=None, seed=seed)
    must_be(case.model, saved, "the original was changed")
    check_sizes(case.model, graph, small)
    small.save(folder / str(seed))
    back = intrafusion.load(folder / str(seed), copy.deepcopy(case.model))
    must_be(back, snapshot(small.model), "what was loaded is not what was saved")
    expected = say(small.model, case)
    if not difference(back, case, expected) <= EXACT:  # the last bit depends on where in memory weights lie
        raise Wrong("the loaded network says something else")
    difference(case.model, case, expected)  # only the shapes
    if not all(bool(x.isfinite().all()) for x in expected):
        raise Wrong("the smaller network gives NaN or infinity")
    return "right" if small.plan.sizes else "refused"


def verdicts(seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """What came of one network, test by test, and what was wrong."""
    case, draw = compose(seed), random.Random(seed)
    oracle.randomise_(case.model, seed)
    try:
        graph = intrafusion.inspect(case.model, case.inputs)
    except Exception:
        return Counter({"inspect crashed": 1}), [report(seed, case, "inspect")]
    free = [g for g in graph.reducible if g.is_channel]
    families = families_of(free)
    kept = {g.name: torch.tensor(sorted(draw.sample(range(g.size), max(1, int(g.size * KEEP + 1e-9))))) for g in free}
    dead, alike = removable(case, families, kept), mergeable(case, families, kept, seed)
    trials: dict[str, tuple[bool, Callable[[], str]]] = {
        "dead": (bool(dead), lambda: try_dead(case, graph, kept, dead)),
        "zeroed": (bool(dead), lambda: try_zeroing(case, graph, kept, dead)),
        "copies": (bool(alike), lambda: try_copies(case, graph, kept, alike, seed)),
        "round trip": (seed % 3 == 0, lambda: try_round_trip(case, graph, seed, folder)),
    }
    counts: Counter[str] = Counter({"groups": len(free), "groups dead": len(dead), "groups alike": len(alike)})
    told = []
    for name, (possible, trial) in trials.items():
        verdict, why = judge(trial) if possible else ("nothing to try", None)
        counts[f"{name}: {verdict}"] += 1
        told += [report(seed, case, f"{name} {verdict}: {why}")] if why else []
    return counts, told


def judge(trial: Callable[[], str]) -> tuple[str, str | None]:
    try:
        return trial(), None
    except ModelError as error:
        return ("refused", None) if "no channel group to reduce" in str(error) else ("crashed", str(error))
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:
        return "crashed", "".join(traceback.format_exception(error, limit=-3))


def report(seed: int, case: Composition, what: str) -> str:
    return f"seed {seed}: {what}\n  {'; '.join(case.story)}"


def test_few_networks_hold_every_block_twice() -> None:
    counts = Counter(step.partition("(")[0] for seed in FEW for step in {*compose(seed).story})
    assert {name for name in {*LEAVING}.union(*KINDS.values()) if counts[name] < 2} == set()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_networks(chunk: int, tmp_path: Path) -> None:
    counts, told = Counter(), []
    for seed in SEEDS[chunk::CHUNKS]:
        found, wrong = verdicts(seed, tmp_path)
        counts += found
        told += wrong
    print(f"\nnetworks {chunk} of {CHUNKS}:", dict(sorted(counts.items())))
    assert not told, "\n".join(told)
    assert counts["dead: right"]
    assert counts["zeroed: right"]
    assert counts["copies: right"]
