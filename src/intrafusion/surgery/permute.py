"""Proof before surgery: permuting the channels of a group must not change the output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, Role, families_of
from intrafusion.network.batches import count_images
from intrafusion.network.double import TOLERANCE, copy_as_double, output_difference, run_in_double
from intrafusion.network.inputs import Inputs
from intrafusion.network.room import find_too_wide
from intrafusion.network.state import Memory
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.reduce.select import pick_rows
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.numbers import explain_state
from intrafusion.surgery.operate import CEILING, tolerance_of
from intrafusion.surgery.search import find_largest_passing
from intrafusion.surgery.smaller import find_smaller
from intrafusion.surgery.streams import random_turn
from intrafusion.surgery.write import write_weights_
from intrafusion.trace.random import Draws


def random_derangement(group: ChannelGroup, generator: np.random.Generator) -> ReductionMap:
    """A random order in which no channel keeps its place."""
    order = generator.permutation(group.size)
    moved = np.empty(group.size, np.int64)
    moved[order] = np.roll(order, 1)
    matrix = pick_rows(torch.from_numpy(moved), group.size)
    return ReductionMap(matrix, matrix.T)


def random_rotation(group: ChannelGroup, generator: np.random.Generator) -> ReductionMap:
    """A random invertible matrix for what produces the channels, and its inverse for what reads them."""
    turned, _ = np.linalg.qr(generator.standard_normal((group.size, group.size)))
    stretched = turned * generator.uniform(0.5, 2.0, group.size)
    return ReductionMap(torch.from_numpy(stretched), torch.from_numpy(np.linalg.inv(stretched)))


Transform = Callable[[ChannelGroup, np.random.Generator], ReductionMap]


@dataclass(eq=False)
class _PermutationCheck:
    """Compares the permuted network with the original one on two inputs."""

    model: nn.Module
    graph: ChannelGraph
    inputs: Sequence[Inputs]
    seed: int = 0

    def __post_init__(self) -> None:
        self.double = copy_as_double(self.model)
        self.memory = Memory(self.double)
        self.weights = {n: t.detach() for n, t in named_tensors(self.double).items()}
        draws = Draws()
        self.expected = list(self._outputs(draws))
        self.draws = tuple(draws.names)  # operations that draw random numbers
        self.means = list(self._outputs(Draws(mean=True))) if self.draws else []
        _check_outputs(self.expected, self.inputs)

    def _outputs(self, draws: Draws) -> Iterator[list[Tensor]]:
        """What the network, as it is now, gives on each input."""
        return (self._run(given, draws, self.memory) for given in self.inputs)

    def _run(self, inputs: Inputs, draws: Draws, memory: Memory | None = None) -> list[Tensor]:
        return run_in_double(self.double, inputs, self.graph.calls, draws, self.graph.ways, memory)

    @cached_property
    def tolerance(self) -> float:
        """What rounding may do to the output of this network."""
        means = self.means or self.expected
        return max(
            tolerance_of(self.double, lambda _, i=i: self._run(i, Draws(mean=bool(self.draws))), e)
            for i, e in zip(self.inputs, means, strict=True)
        )

    def passes(self, error: float) -> bool:
        return error <= TOLERANCE or (error <= CEILING and error <= self.tolerance)

    def error(
        self,
        groups: Sequence[ChannelGroup],
        make: Transform = random_derangement,
        *,
        random: bool = False,
    ) -> float:
        """Relative change of the output when all these groups are permuted, or transformed, at once.

        Args:
            random: whether the same random numbers must do, for a network that draws some; else their mean will too.
        """
        with self._transformed([(g, make) for g in groups]):
            return self._measure(random=random)

    def _measure(self, *, random: bool = False) -> float:
        worst = _find_worst(self._outputs(Draws()), self.expected)
        if self.draws and worst > TOLERANCE and not random:
            worst = min(worst, _find_worst(self._outputs(Draws(mean=True)), self.means))
        return worst

    def holds(self, transformed: Sequence[tuple[ChannelGroup, Transform]]) -> bool:
        """Whether the output stays when all this is done to groups at once; one input that tells otherwise will do."""
        worst = 0.0
        with self._transformed(transformed):
            if self.draws:
                worst = self._measure()
            for found, expected in () if self.draws else zip(self._outputs(Draws()), self.expected, strict=True):
                worst = max(worst, output_difference(found, expected))
                if worst > CEILING:
                    break
        return self.passes(worst)

    @contextlib.contextmanager
    def _transformed(self, transformed: Sequence[tuple[ChannelGroup, Transform]]) -> Iterator[None]:
        generator = np.random.default_rng(self.seed)
        maps = {g.name: make(g, generator) for g, make in transformed}
        tried = {g.name: g for g, _ in transformed}
        graph = replace(self.graph, groups=tuple(tried.get(g.name, g) for g in self.graph.groups))
        changed = reduce_weights(self.weights, graph, maps)
        write_weights_(self.double, changed)
        tensors = named_tensors(self.double)
        try:
            with self.memory.holding([tensors[name] for name in changed]):
                yield
        finally:
            write_weights_(self.double, {name: self.weights[name] for name in changed})


def _find_worst(found: Iterable[list[Tensor]], expected: Sequence[list[Tensor]]) -> float:
    return max(output_difference(f, e) for f, e in zip(found, expected, strict=True))


def _check_outputs(outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Inputs]) -> None:
    """Refuse a network of whose outputs nothing is left to compare."""
    for given, found in zip(inputs, outputs, strict=True):
        numbers = [t for t in found if t.numel() and (t.is_floating_point() or t.is_complex())]
        if numbers and not any(bool(torch.isfinite(t).any()) for t in numbers):
            raise ModelError(
                f"the network gives nothing but NaN or infinity on {given.source} {given}; expected finite outputs at "
                f"some places at least. {_ALONE if count_images(given) == 1 else _CHECK}"
            )


_CHECK = "Check the scale of the inputs, and the buffers of the network."
_ALONE = (
    "Pass two images or more, if the network takes statistics of the batch: of a single one, no deviation is defined. "
    "Else check the scale of the inputs, and the buffers of the network."
)


def verify_groups(model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> ChannelGraph:
    """The graph, in which every group that fails the permutation check has that as its reason.

    All groups are permuted at once, and whole blocks with them; only a failure is searched for, by halving. On a
    smaller image all may pass, which is as good; whatever fails there is tried on the given one.
    """
    graph = _leave_too_wide(graph)
    groups = [g for g in graph.reducible if g.is_channel]
    if not groups:
        return graph
    small = find_smaller(model, graph, inputs)
    if small is not None:
        proved = _prove_on(model, graph, groups, small)
        if all(a is b for a, b in zip(proved.groups, graph.groups, strict=True)):
            return proved
    return _prove_on(model, graph, groups, inputs)


def _prove_on(model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], inputs: Inputs) -> ChannelGraph:
    check = _PermutationCheck(model, graph, (inputs, inputs.varied(seed=1)))
    blocks = [g for g in graph.reducible if not g.is_channel]
    if check.draws or not (blocks and check.holds([(g, random_derangement) for g in (*groups, *blocks)])):
        graph = _prove_blocks(_prove_channels(model, graph, groups, check), check)
    return _prove_mixing(graph, check)


def _prove_channels(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], check: _PermutationCheck
) -> ChannelGraph:
    """The graph, in which channels whose order matters have that as their reason."""
    passed, failed = find_largest_passing(
        families_of(groups), lambda gs: None if check.passes(e := check.error(gs)) else e
    )
    why = "permuting its channels changes the output by"
    drawn = f"; the forward draws random numbers ({', '.join(check.draws)})" if check.draws else ""
    reasons = {g.name: f"{why} {e:.1e} (relative){drawn}{explain_state(model, {g.size})}" for g, e in failed}
    return _forbid_mixing(add_reasons(graph, reasons), _find_drawn(check, passed), _DRAWN)


def _leave_too_wide(graph: ChannelGraph) -> ChannelGraph:
    """The graph, in which groups whose permutations do not fit into memory have that as their reason."""
    groups = [g for g in graph.reducible if g.is_channel]
    wide = find_too_wide({g.name: g.size for g in groups}, torch.device("cpu"))
    for family in families_of(groups):
        why = next((wide[g.name] for g in family if g.name in wide), None)
        wide |= {} if why is None else {g.name: why for g in family}
    return add_reasons(graph, wide)


def _prove_blocks(graph: ChannelGraph, check: _PermutationCheck) -> ChannelGraph:
    """The graph, in which whole blocks whose order matters have that as their reason."""
    blocks = [g for g in graph.reducible if not g.is_channel]
    _, failed = find_largest_passing(families_of(blocks), lambda gs: None if check.passes(e := check.error(gs)) else e)
    return add_reasons(graph, {g.name: f"permuting its blocks changes the output by {e:.1e}" for g, e in failed})


_DRAWN = "random numbers are drawn for each of its channels"
_NOT_LINEAR = "something that is not linear, or a rotary embedding, lies before the product of its two sides"


def _prove_mixing(graph: ChannelGraph, check: _PermutationCheck) -> ChannelGraph:
    """The graph, in which groups may be mixed, and rotated, only as random matrices leave the output as it is.

    All that is claimed is tried at once first: any rotations, or those of the one stream that leave its mean alone.
    """
    linear = _list_linear(graph)
    turned = [g for g in graph.reducible if g.rotation is not None]
    apart = not {g.name for g in linear} & {g.name for g in turned}
    for centred in (False, True) if len(families_of(turned)) == 1 else (False,):
        tried = [_centre(g, centred) for g in turned]
        maps = [*((g, random_rotation) for g in linear), *((g, random_turn) for g in tried)]
        if maps and apart and check.holds(maps):
            return _keep_rotations(_keep_linear(graph, linear), tried, {})
    return _prove_rotations(_prove_linear(graph, check), check)


def _list_linear(graph: ChannelGraph) -> list[ChannelGroup]:
    return [g for g in graph.reducible if g.is_channel and g.linear and g.unmixable is None and g.size > 1]


def _prove_linear(graph: ChannelGraph, check: _PermutationCheck) -> ChannelGraph:
    """The graph, in which `linear` holds only where a random invertible matrix leaves the output as it is."""
    passed, _ = find_largest_passing(
        families_of(_list_linear(graph)),
        lambda groups: None if check.holds([(g, random_rotation) for g in groups]) else True,
        lambda _, failed: failed,
    )
    return _keep_linear(graph, passed)


def _keep_linear(graph: ChannelGraph, passed: Sequence[ChannelGroup]) -> ChannelGraph:
    names = {g.name for g in passed}
    kept = (g if g.linear == (g.name in names) else replace(g, linear=g.name in names) for g in graph.groups)
    graph = replace(graph, groups=tuple(kept))
    return _forbid_mixing(graph, {g.name for g in graph.reducible if g.with_role(Role.MATCHES)} - names, _NOT_LINEAR)


def _prove_rotations(graph: ChannelGraph, check: _PermutationCheck) -> ChannelGraph:
    """The graph, in which only those groups have a `rotation` of which a random one leaves the output as it is.

    First any rotation is tried, then those that leave the mean of the channels alone. Other groups get the reason.
    """
    found: dict[str, ChannelGroup] = {}
    errors: dict[str, float] = {}
    for centred in (False, True):
        tried = [_centre(g, centred) for g in graph.reducible if g.rotation is not None and g.name not in found]
        passed, failed = find_largest_passing(
            families_of(tried), lambda groups: None if check.passes(e := check.error(groups, random_turn)) else e
        )
        found |= {g.name: g for g in passed}
        errors |= {g.name: e for g, e in failed}
    return _keep_rotations(graph, list(found.values()), errors)


def _keep_rotations(graph: ChannelGraph, passed: Sequence[ChannelGroup], errors: Mapping[str, float]) -> ChannelGraph:
    found = {g.name: g.rotation for g in passed}
    turned = {g.name: g for g in graph.groups if g.rotation is not None}
    kept = {
        name: replace(g, rotation=found[name]) if name in found else _leave_unrotated(g, errors)
        for name, g in turned.items()
    }
    return replace(graph, groups=tuple(kept.get(g.name, g) for g in graph.groups)) if kept else graph


def _centre(group: ChannelGroup, centred: bool) -> ChannelGroup:
    assert group.rotation is not None
    return replace(group, rotation=replace(group.rotation, centred=centred))


def _leave_unrotated(group: ChannelGroup, errors: Mapping[str, float]) -> ChannelGroup:
    if group.name not in errors:
        return replace(group, rotation=None)
    why = f"not rotated: that changes the output by {errors[group.name]:.1e} (relative)"
    return replace(group, rotation=None, unmixable=f"{group.unmixable}; {why}")


def add_reasons(graph: ChannelGraph, reasons: dict[str, str]) -> ChannelGraph:
    if not reasons:
        return graph
    groups = tuple(replace(g, reason=reasons.get(g.name, g.reason)) for g in graph.groups)
    return replace(graph, groups=groups)


def _find_drawn(check: _PermutationCheck, groups: list[ChannelGroup]) -> set[str]:
    """Groups of whose channels each gets random numbers of its own, as in a dropout that is always on."""
    if not check.draws or check.error(groups, random=True) <= TOLERANCE:
        return set()
    return {g.name for family in families_of(groups) for g in family if check.error(family, random=True) > TOLERANCE}


def _forbid_mixing(graph: ChannelGraph, names: set[str], why: str) -> ChannelGraph:
    if not names:
        return graph
    return replace(graph, groups=tuple(_leave_unmixed(g, why) if g.name in names else g for g in graph.groups))


def _leave_unmixed(group: ChannelGroup, why: str) -> ChannelGroup:
    """The group, to be selected from: neither mixed nor rotated."""
    told = f"{group.unmixable}; not rotated: {why}" if group.rotation is not None else group.unmixable or why
    return replace(group, unmixable=told, rotation=None)
