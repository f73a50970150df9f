"""Proof: permuting the channels of a group must not change the output; the smaller network must show the same groups.

Both checks go through the code that does the reduction (`apply.py`), in float64.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from intrafusion.apply import Repair, named_tensors, reduced_weights, write_
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, Slice, families_of
from intrafusion.inputs import Inputs
from intrafusion.reduce.problem import ReductionMap
from intrafusion.trace import trace
from intrafusion.trace.state import preserved

TOLERANCE = 1e-8
ENOUGH = 2  # failures of one kind after which the others are not tried one by one
Kind = tuple[tuple[str, int], ...]
Maps = dict[str, ReductionMap]
F = TypeVar("F")


class DoublePrecision(TorchDispatchMode):
    """Everything in float64, also where a network casts to less or makes constants in less."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = torch.float64
        if not func._schema.is_mutable:
            args, kwargs = tree_map(as_double, args), tree_map(as_double, kwargs)
        return func(*args, **kwargs)


def as_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def outputs_in_double(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with preserved(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), DoublePrecision():
        return inputs.double().call(model)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference over all outputs, relative to each output's largest value; inf if not comparable."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and a.is_floating_point():
            error = (a - b).abs().max() / b.abs().max().clamp(min=1e-300)
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst


def permutation(group: ChannelGroup, generator: np.random.Generator) -> ReductionMap:
    """A random order in which no channel keeps its place."""
    order = generator.permutation(group.size)
    moved = np.empty(group.size, np.int64)
    moved[order] = np.roll(order, 1)
    matrix = torch.eye(group.size, dtype=torch.float64)[torch.from_numpy(moved)]
    return ReductionMap(matrix, matrix.T.contiguous())


@dataclass(eq=False)
class PermutationCheck:
    """Compares the permuted network with the original one on two inputs."""

    model: nn.Module
    graph: ChannelGraph
    inputs: Sequence[Inputs]
    seed: int = 0

    def __post_init__(self) -> None:
        self.double = copy_of(self.model).double()
        self.weights = {n: t.detach() for n, t in named_tensors(self.double).items()}
        self.expected = [outputs_in_double(self.double, i) for i in self.inputs]

    def error(self, groups: Sequence[ChannelGroup]) -> float:
        """Relative change of the output when all these groups are permuted at once."""
        generator = np.random.default_rng(self.seed)
        maps = {g.name: permutation(g, generator) for g in groups}
        permuted = reduced_weights(self.weights, self.graph, maps)
        write_(self.double, permuted)
        found = [outputs_in_double(self.double, i) for i in self.inputs]
        write_(self.double, {name: self.weights[name] for name in permuted})
        return max(difference(f, e) for f, e in zip(found, self.expected, strict=True))


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of networks that hold tensors with a history."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the network ({type(model).__name__}) cannot be copied: {type(error).__name__}: {error}. "
            f"Remove what holds a computation graph or an open handle (old-style weight_norm: "
            f"torch.nn.utils.remove_weight_norm), or pass inplace=True on a network of your own."
        ) from error


def reduced_copy(model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> nn.Module:
    """A copy after the maps, as it comes: neither run nor traced."""
    small = copy_of(model)
    write_(small, reduced_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps))
    return small


def verified(model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> ChannelGraph:
    """The graph, in which every group that fails the permutation check has that as its reason.

    All groups are permuted at once; only a failure is searched for, by halving.
    """
    groups = [g for g in graph.reducible if g.kind == "channel"]
    if not groups:
        return graph
    check = PermutationCheck(model, graph, (inputs, inputs.varied(seed=1)))
    _, failed = largest_passing(families_of(groups), lambda gs: None if (e := check.error(gs)) <= TOLERANCE else e)
    reasons = {g.name: f"permuting its channels changes the output by {e:.1e} (relative)" for g, e in failed}
    return with_reasons(graph, reasons)


def with_reasons(graph: ChannelGraph, reasons: dict[str, str]) -> ChannelGraph:
    groups = tuple(replace(g, reason=reasons.get(g.name, g.reason)) for g in graph.groups)
    return replace(graph, groups=groups)


def largest_passing(
    families: list[list[ChannelGroup]],
    failure: Callable[[list[ChannelGroup]], F | None],
    likewise: Callable[[ChannelGroup, F], F] | None = None,
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, F]]]:
    """A maximal set of families that pass together, and each of the others with its failure; found by halving.

    Args:
        failure: of some groups together; None if they pass.
        likewise: the failure of a group that is like another (`kind_of`) with that failure. With it, families of a kind
            that failed `ENOUGH` times and never passed are not tried one by one any more, but once all together.
    """
    passed: list[ChannelGroup] = []
    failed: list[tuple[ChannelGroup, F]] = []
    good: set[Kind] = set()
    bad: dict[Kind, list[tuple[ChannelGroup, F]]] = defaultdict(list)  # one group of each family that failed alone
    put_off: dict[Kind, list[ChannelGroup]] = defaultdict(list)

    def hopeless(family: list[ChannelGroup]) -> bool:
        kind = kind_of(family)
        return likewise is not None and kind not in good and len(bad[kind]) >= ENOUGH

    def add(part: list[list[ChannelGroup]]) -> None:
        for family in filter(hopeless, part):
            put_off[kind_of(family)] += family
        part = [family for family in part if not hopeless(family)]
        groups = [g for family in part for g in family]
        why = failure(passed + groups) if groups else None
        if why is None:
            passed.extend(groups)
            good.update(kind_of(family) for family in part)
        elif len(part) == 1:
            failed.extend((g, why) for g in groups)
            bad[kind_of(part[0])].append((groups[0], why))
        else:
            add(part[: len(part) // 2])
            add(part[len(part) // 2 :])

    if families:
        add(families)
    for kind, groups in put_off.items():
        if failure(passed + groups) is None:
            passed.extend(groups)
        else:
            assert likewise is not None
            failed.extend((g, likewise(*bad[kind][0])) for g in groups)
    return passed, failed


def kind_of(family: list[ChannelGroup]) -> Kind:
    """Names but for their numbers, and sizes: the same for what repeats from block to block."""
    return tuple((re.sub(r"\d+", "#", g.name), g.size) for g in family)


# ---- after surgery --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Surgery:
    """The smaller network, what had to follow, and the groups that had to be left alone with the reason."""

    model: nn.Module
    repairs: tuple[Repair, ...]
    rolled_back: dict[str, str]


def operate(model: nn.Module, graph: ChannelGraph, maps: Maps, inputs: Inputs) -> Surgery:
    """Reduce a copy of the network; groups after which it does not run, or shows other groups, are rolled back."""
    weights = {n: t.detach() for n, t in named_tensors(model).items()}

    attempts: dict[frozenset[str], tuple[nn.Module, tuple[Repair, ...]]] = {}

    def attempt(groups: Sequence[ChannelGroup]) -> nn.Module:
        chosen = {g.name: maps[g.name] for g in groups}
        small = copy_of(model)
        repairs = write_(small, reduced_weights(weights, graph, chosen))
        attempts.clear()
        attempts[frozenset(chosen)] = small, repairs
        return small

    def failure(groups: Sequence[ChannelGroup]) -> str | None:
        try:
            found = trace(attempt(groups), inputs)
        except Exception as error:  # anything that goes wrong is a reason to leave these groups alone
            return f"the smaller network does not run ({short(error)})"
        expected = shrunk(graph, {g.name: len(maps[g.name].merge) for g in groups})
        return disagreement(expected, found) or confusion(expected, found, siblings(graph))

    groups = [g for g in graph.groups if g.name in maps]
    passed, failed = largest_passing(families_of(groups), failure, lambda g, why: f"like {g.name}: {why}")
    names = frozenset(g.name for g in passed)
    if names not in attempts:
        attempt(passed)
    small, repairs = attempts[names]
    return Surgery(small, repairs, {g.name: why for g, why in failed})


def short(error: Exception) -> str:
    cause = error.__cause__
    text = f"{type(cause).__name__}: {cause}" if cause else str(error)
    return " ".join(text.split())[:200]


def shrunk(graph: ChannelGraph, sizes: dict[str, int]) -> ChannelGraph:
    """The graph that the smaller network must show: the same groups, n turned into m, positions moved up."""
    renumber = Renumbering(graph, sizes)
    groups = []
    for group in graph.groups:
        if group.kind == "channel":
            m = sizes.get(group.name, group.size)
            members = tuple(renumber(replace(x, positions=x.positions[:m])) for x in group.members)
            groups.append(replace(group, size=m, members=members))
    return replace(graph, groups=tuple(groups))


class Renumbering:
    """Old index -> new index along every dimension that loses places."""

    def __init__(self, graph: ChannelGraph, sizes: dict[str, int]) -> None:
        self.dropped: dict[tuple[str, int, Slice | None], np.ndarray] = {}
        for group in graph.groups:
            if group.name in sizes:
                for member in group.members:
                    gone = member.positions[sizes[group.name] :].ravel()
                    before = self.dropped.get(member.key(), np.zeros(0, np.int64))
                    self.dropped[member.key()] = np.sort(np.concatenate([before, gone]))

    def shift(self, key: tuple[str, int, Slice | None], index: Any) -> Any:
        gone = self.dropped.get(key)
        return index if gone is None else index - np.searchsorted(gone, index)

    def __call__(self, member: Any) -> Any:
        positions = self.shift(member.key(), member.positions)
        within = member.within
        if within is not None:
            along = (member.tensor, within.dim, None)
            within = Slice(within.dim, int(self.shift(along, within.start)), int(self.shift(along, within.stop)))
        return replace(member, positions=positions, within=within)


def disagreement(expected: ChannelGraph, found: ChannelGraph) -> str | None:
    """A group that the network no longer shows; groups of one channel leave no trace and are not compared."""
    wanted = {signature(g): g for g in expected.groups if g.size > 1 and g.kind == "channel"}
    present = {signature(g) for g in found.groups if g.size > 1 and g.kind == "channel"}
    missing = [g.name for s, g in wanted.items() if s not in present]
    if not missing:
        return None
    return (
        f"the smaller network no longer shows {missing[0]!r} as a group of {wanted_size(expected, missing[0])} channels"
    )


def wanted_size(graph: ChannelGraph, name: str) -> int:
    return graph[name].size


def confusion(expected: ChannelGraph, found: ChannelGraph, alike: list[set[str]]) -> str | None:
    """Groups of one channel that the network now takes for each other, as where it slices at a fixed index.

    Single channels of blocks that were interchangeable as wholes may join.
    """
    single = [g for g in expected.groups if g.kind == "channel" and g.size == 1]
    owner = {(m.key(), p): g.name for g in single for m in g.members for p in m.positions.ravel().tolist()}
    for group in found.reducible:
        if group.kind == "channel":
            names = {owner.get((m.key(), p), "") for m in group.members for p in m.positions.ravel().tolist()} - {""}
            if len(names) > 1 and not any(names <= blocks for blocks in alike):
                return (
                    f"the smaller network treats the single channels of {' and '.join(map(repr, sorted(names)))} alike"
                )
    return None


def siblings(graph: ChannelGraph) -> list[set[str]]:
    """Names of the channel groups that lie in the same interchangeable blocks."""
    blocks, channels = ([g for g in graph.groups if g.kind == kind] for kind in ("block", "channel"))
    return [{g.name for g in channels if lies_in(g, block)} for block in blocks]


def lies_in(group: ChannelGroup, block: ChannelGroup) -> bool:
    places = {(m.tensor, m.dim): m.positions for m in block.members}
    own = [m for m in group.members if m.within is None and (m.tensor, m.dim) in places]
    return any(np.isin(m.positions, places[m.tensor, m.dim]).all() for m in own)


def signature(group: ChannelGroup) -> bytes:
    """Which index of which tensor is which channel, in an order of its own."""
    members = sorted(group.members, key=lambda m: (m.tensor, m.dim, str(m.within)))
    order = np.argsort(members[0].positions.min(1), kind="stable")
    parts = [
        f"{m.tensor}|{m.dim}|{m.within}|{sorted(m.roles)}".encode() + np.sort(m.positions[order], 1).tobytes()
        for m in members
    ]
    return b"\n".join(parts)
