"""Proof of function: the smaller network gives what the original gives without the removed channels, in float64.

A permutation cannot see what a forward derives from the number of channels, such as the 1 / sqrt(d) of attention. Here
the smaller network is compared with the original one at its full width, in which nothing is removed but every reader
finds zeros where a removed channel comes in. A number that the forward took from the width is undone where one number
on the maps does so exactly; else the group is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import READS, ChannelGraph, ChannelGroup, Factor, Member, Role, Slice
from intrafusion.names import advise_to_fold
from intrafusion.network.decisions import call_ways
from intrafusion.network.double import DoublePrecision, copy_as_double, output_difference, run_in_double
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.frozen import Statistics, frozen_statistics, noted_statistics
from intrafusion.surgery.maps import (
    find_averaged_biases,
    mix_channels,
    narrow_to,
    norm_tensors,
    reduce_weights,
)
from intrafusion.surgery.norms import fold_norms
from intrafusion.surgery.operate import Maps, RepairsOf, Surgery, operate, tolerance_of
from intrafusion.surgery.scopes import is_inside
from intrafusion.surgery.search import FamilyKind, family_kind
from intrafusion.surgery.streams import find_turned, fold_streams_, is_turned, select_instead, widen_turn
from intrafusion.surgery.write import weights_written
from intrafusion.trace.call import name_operation
from intrafusion.trace.dispatch import Tracer
from intrafusion.trace.info import Weight
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.random import Draws
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.contraction import PRODUCTS
from intrafusion.trace.run import follow_call, follow_run, trace_private

FUNCTION = "function"
_SYMMETRY = "symmetry"
_CLOSE = 1e-10  # a factor of attention may change little, on the example
_SUMMED = (str(Cause.REDUCTION), str(Cause.PRODUCT))
_INPUTS = READS
_OUTPUTS = frozenset([Role.PRODUCES, Role.SHIFTS, Role.MEAN])
_MULTIPLIES = ("mul", "mean", "addmm", "baddbmm")
_Scale = tuple[float, float]
_Place = tuple[str, int, Slice | None]
_Changes = Mapping[int, tuple[Factor, Factor]]  # numbers that differ between two networks, by their place


@dataclass(eq=False)
class Reference:
    """A network in float64, and what it gives: one for all checks of networks that are made from it.

    The copy is the only one; what is checked is written into it for the time of a run.
    """

    model: nn.Module
    graph: ChannelGraph
    inputs: Inputs

    __repr__ = show_briefly

    @cached_property
    def double(self) -> nn.Module:
        return copy_as_double(self.model)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in named_tensors(self.double).items()}

    @cached_property
    def probe(self) -> Inputs:
        return self.inputs.varied(seed=1)

    @cached_property
    def outputs(self) -> list[Tensor]:
        return self.run()

    @cached_property
    def tolerance(self) -> float:
        return tolerance_of(self.double, lambda _: self.run(), self.outputs, _CLOSE)

    def run(self) -> list[Tensor]:
        """Outputs over the calls that were traced; random numbers at their mean, as other widths draw others."""
        return run_in_double(self.double, self.probe, self.graph.calls, Draws(mean=True), self.graph.ways)


@dataclass(frozen=True, eq=False)
class Proved:
    """What a plan makes of a network, and how it was proved.

    Attributes:
        check: that the surgery passed.
        unturned: why groups were selected that were to be rotated, by name.
    """

    surgery: Surgery
    check: FunctionCheck
    unturned: Mapping[str, str] = field(default_factory=dict)

    __repr__ = show_briefly


def carry_out(reference: Reference, maps: Maps) -> Proved:
    """The smaller network of these maps, proved; rotations that the proof does not bear out become selections.

    What a random rotation of all channels leaves as it is may still depend on how many there are, as a deviation with
    n - 1 in it does. A selection of these has no original to be compared with, and no proof but by symmetry.
    """
    check = FunctionCheck(reference)
    surgery = operate(reference.model, reference.graph, maps, reference.inputs, check)
    turned = find_turned(reference.graph.groups, {n: maps[n] for n in surgery.unproved})
    if not turned:
        return Proved(surgery, check)
    why = {g.name: f"{g.unmixable}; not rotated: {surgery.rolled_back[g.name]}" for g in turned}
    found = carry_out(reference, {**maps, **{name: select_instead(maps[name]) for name in why}})
    return replace(found, unturned={**found.unturned, **why})


@dataclass(eq=False)
class FunctionCheck:
    """Compares smaller networks with the original one without the channels that they lack.

    Groups of which something looks at all channels together (`ChannelGroup.together`) have no such original: for them
    it is only checked that no number that meets their channels differs between the two networks. A group that is
    rotated has one: that in which its channels are confined to the directions that are kept.

    Attributes:
        scales: what the maps of a group must be multiplied by, (merge, unmerge), found so far; by group name.
        proved: groups that passed together, and how: "function" or "symmetry".
    """

    reference: Reference
    scales: dict[str, _Scale] = field(default_factory=dict)
    proved: dict[str, str] = field(default_factory=dict)
    explained: set[int] = field(default_factory=set)  # factors that differ and do no harm, by place
    revision: int = 0
    alike: dict[tuple[FamilyKind, int], _Scale] = field(default_factory=dict)  # tried first on groups like those
    repairs_of: RepairsOf = lambda _: ()  # what must follow in the attributes of a smaller network

    __repr__ = show_briefly

    @property
    def graph(self) -> ChannelGraph:
        return self.reference.graph

    @cached_property
    def groups(self) -> dict[str, ChannelGroup]:
        return {g.name: g for g in self.graph.groups}

    def settled(self, maps: Maps) -> Maps:
        """The maps with the scales that were found for their groups."""
        found = {n: self.scales.get(n, self.alike.get(self._kind(n, m))) for n, m in maps.items()}
        return {
            n: m if found[n] is None else _scale_map(m, found[n]) for n, m in maps.items()
        }  # a plan's own scale stays

    def _kind(self, name: str, reduction: ReductionMap) -> tuple[FamilyKind, int]:
        return family_kind([self.groups[name]]), len(reduction.merge)

    def __call__(self, maps: Maps, found: ChannelGraph, repairs_of: RepairsOf = lambda _: ()) -> str | None:
        """Why the smaller network does something else, in words; None if it does not."""
        self.repairs_of = repairs_of
        changed = _find_changed_factors(self.graph.factors, found.factors)
        fresh = {i: pair for i, pair in changed.items() if i not in self.explained}
        exact = self._select_exact(maps)
        why = self._disprove(maps, exact, fresh)
        if why and (exact.keys() == maps.keys() or not self._holds_frozen(maps, fresh)):
            return why
        odd = _leave_out_means(fresh)
        looked_at = maps.keys() - exact.keys() - self.proved.keys()
        if odd and looked_at and not why and (left := self._find_other(odd, exact)):
            return _explain(None, left, [])
        self.explained |= fresh.keys()
        self.proved = {n: FUNCTION if n in exact else _SYMMETRY for n in maps}
        for name, reduction in maps.items():  # what passed stays as it is, whatever is found for others like it
            self.scales.setdefault(name, (1.0, 1.0) if reduction.scale is None else tuple(reduction.scale.tolist()))
        return None

    def _disprove(self, maps: Maps, exact: Maps, changed: _Changes) -> str | None:
        """Why the network is not right, as far as these groups can tell that can be compared; None if it is."""
        unproved = self._find_unproved_numbers(maps, exact)
        if unproved:
            return unproved
        error = self.error(exact)
        if self.passes(error) or self.compensate(maps, exact, changed):
            return None
        told = _leave_out_means(changed) if find_turned(self.graph.groups, exact) else changed
        return _explain(error, told, self._derived(maps))

    def _holds_frozen(self, maps: Maps, changed: _Changes) -> bool:
        """Whether the network is right where its layer norms have the statistics of the original without the channels.

        Attention whose width is that of the stream has no network in which only its heads are smaller.
        """
        return self.passes(self.error(maps, frozen=True)) or self.compensate(maps, maps, changed, frozen=True)

    def _select_exact(self, maps: Maps) -> Maps:
        """Those that have an original to be compared with.

        Where a number in an attribute is the size of such groups and of others, no network has only the former reduced:
        then those go that run through modules with such numbers.
        """
        groups = self.groups
        exact = {n: m for n, m in maps.items() if groups[n].together is None or is_turned(groups[n], m)}
        if self.repairs_of(exact) is not None:
            return exact
        modules = {repair.module for repair in self.repairs_of(maps) or ()}
        apart = {
            n: m
            for n, m in exact.items()
            if not any(is_inside(x.module, o) for x in self.groups[n].members for o in modules)
        }
        return {} if self.repairs_of(apart) is None else apart

    def _find_other(self, changed: _Changes, exact: Maps) -> _Changes:
        """Changed factors that are not the same where only these groups are reduced, whose function is proved."""
        if not exact:
            return changed
        reference = self.reference
        weights = reduce_weights(reference.weights, self.graph, self.settled(exact))
        with weights_written(reference.double, weights, self.repairs_of(exact) or ()):
            inputs = reference.probe.double()
            alone = trace_private(reference.double, inputs, calls=self.graph.calls, ways=self.graph.ways).factors
        alike = _find_changed_factors(self.graph.factors, alone)
        is_same = lambda i, new: i in alike and math.isclose(alike[i][1].value, new.value, rel_tol=1e-6)  # noqa: E731
        return {i: pair for i, pair in changed.items() if not is_same(i, pair[1])}

    def _find_unproved_numbers(self, maps: Maps, exact: Maps) -> str:
        """Numbers in attributes that followed groups of which no function is proved, in words.

        Whatever else such a number means to the forward, a length or a limit, would change unseen.
        """
        known = {(r.module, r.attribute, r.new) for r in self.repairs_of(exact) or ()}
        others = [r for r in self.repairs_of(maps) or () if (r.module, r.attribute, r.new) not in known]
        if not others:
            return ""
        shown = ", ".join(f"{r.module}.{r.attribute}".lstrip(".") for r in others[:3])
        return (
            f"the width stands as a number in an attribute ({shown}), and what that does besides cannot be proved "
            "where something looks at all channels; take it from a shape"
        )

    def _derived(self, maps: Maps) -> list[str]:
        """What the new groups are read, or made, through, in words."""
        groups = [self.groups[n] for n in maps if n not in self.proved]
        members = [m for role in (Role.CONSUMES, Role.PRODUCES) for g in groups for m in g.with_role(role)]
        derived = self.graph.derived
        return [f"{m.tensor} is used through {derived[m.tensor]}" for m in members if m.tensor in derived]

    def passes(self, error: float) -> bool:
        return error <= _CLOSE or error <= self.reference.tolerance

    def error(self, maps: Maps, *, frozen: bool = False) -> float:
        """Largest difference of the outputs, relative to the largest output; infinite where there are none.

        A network in which only these groups are smaller may not run: attention whose width is that of its heads, say.

        Args:
            frozen: layer norms use the statistics of the original without the channels.
        """
        if not maps:
            return 0.0
        double, noted = self.reference.double, Statistics()
        with noted_statistics(double, noted) if frozen else contextlib.nullcontext():
            expected = self.expected({name: _scale_map(m, None) for name, m in maps.items()})
        weights = reduce_weights(self.reference.weights, self.graph, maps)
        with weights_written(double, weights, self.repairs_of(maps) or ()):
            try:
                with frozen_statistics(double, noted) if frozen else contextlib.nullcontext():
                    found = self.reference.run()
            except ModelError:
                return math.inf
        return output_difference(found, expected)

    def is_same_without(self, maps: Maps) -> bool:
        """Whether the original network gives the same where nothing comes in from the channels that maps remove."""
        return self.passes(output_difference(self.expected(maps), self.reference.outputs))

    def expected(self, maps: Maps) -> list[Tensor]:
        """What the original network gives where nothing comes in from the channels that these maps remove."""
        reference = self.reference
        buffers = {name for name, _ in reference.double.named_buffers()}
        weights, masks = _zero_removed(reference.weights, self.graph, maps, buffers)
        with weights_written(reference.double, weights):
            if not masks:
                return reference.run()
            tracer, inputs = _Masking(reference.double, masks), reference.probe.double()
            with follow_run(tracer, reference.double, inputs), tracer, DoublePrecision():
                call = lambda given: follow_call(tracer.ledger, reference.double, given.double())  # noqa: E731
                with Draws(mean=True):
                    return call_ways(call, inputs, self.graph.calls, self.graph.ways)

    # ---- numbers that the forward takes from the width ---------------------------------------------------------------

    def compensate(self, maps: Maps, exact: Maps, changed: _Changes, *, frozen: bool = False) -> bool:
        """Find what the maps of what is new must be scaled by to undo these changes.

        First the root of the width that attention divides by, for all heads at once: they may only run with all that is
        in them cut. Then what a rotation took for the mean of an RMS norm, where channels are divided by their length.
        Then, for one family, every number that may be it.
        """
        names = [n for n in exact if n not in self.proved]
        if not names:
            return False
        matched = [n for n in names if self.groups[n].with_role(Role.MATCHES)]
        roots = {n: (1.0, math.sqrt(len(exact[n].merge) / self.groups[n].size)) for n in matched}
        if roots and self.is_undone_by(roots, exact, frozen=frozen):
            return True
        turned = {n: _find_lengthening(self.groups[n], exact[n]) for n in names if is_turned(self.groups[n], exact[n])}
        if turned and self.is_undone_by(turned, exact, frozen=frozen):
            return True
        if matched or len({self.groups[n].family for n in names}) > 1:
            names = matched
        plain = all(maps[n].scale is None for n in names)  # and was tried already
        shares = {len(exact[n].merge) / self.groups[n].size for n in names}
        scales = itertools.islice(_list_candidates(changed, shares), int(plain), None)
        return any(self.is_undone_by(dict.fromkeys(names, scale), exact, frozen=frozen) for scale in scales)

    def is_undone_by(self, scales: Mapping[str, _Scale], exact: Maps, *, frozen: bool = False) -> bool:
        """Whether maps that are scaled by these numbers make up for all that changed; if so, they are kept."""
        scaled = {n: _scale_map(m, scales[n]) if n in scales else m for n, m in exact.items()}
        if not scales or not self.passes(self.error(scaled, frozen=frozen)):
            return False
        self.scales |= scales
        self.alike |= {self._kind(n, exact[n]): scale for n, scale in scales.items()}
        self.revision += 1
        return True


def _find_lengthening(group: ChannelGroup, reduction: ReductionMap) -> _Scale:
    """Of a rotation, see `rotation_map`, for norms that are no mean over the channels: a length, a cosine."""
    root = math.sqrt(group.size / len(reduction.merge))
    return root, 1 / root


def _list_candidates(changed: _Changes, shares: Iterable[float]) -> Iterator[_Scale]:
    """Scales of (merge, unmerge) that may undo changed factors.

    Behind a product of the channels with each other or before a reader, or at a producer, which readers before the
    factor make up for.

    Args:
        shares: of their channels that groups keep, of which factors are powers; a forward may have rounded these.
    """
    powers = [share**power for share in shares for power in (0.5, -0.5, 1.0, -1.0)]
    ratios = [_round_to(_find_ratio(*pair), powers) for pair in changed.values()]
    known = [r for r in ratios if r is not None and math.isfinite(r) and r > 0]
    yield (1.0, 1.0)
    for total in dict.fromkeys([math.prod(known), *known] if known else []):
        root = math.sqrt(total)
        yield from ((root, 1.0), (1.0, total), (total, 1.0), (root, 1 / root), (total, 1 / total))


def _find_ratio(old: Factor, new: Factor) -> float | None:
    """What the result of an operation must be multiplied by to be what it was; None where no number does that."""
    if 0.0 in (old.value, new.value):
        return None
    if old.operation in _MULTIPLIES:
        return old.value / new.value
    return new.value / old.value if old.operation == "div" else None


def _round_to(ratio: float | None, exact: Sequence[float]) -> float | None:
    """One of these numbers that a ratio of numbers in single precision may be, else the ratio."""
    return ratio and next((e for e in exact if math.isclose(ratio, e, rel_tol=1e-6)), ratio)


def _find_changed_factors(old: Sequence[Factor], new: Sequence[Factor]) -> _Changes:
    """Numbers that differ between two traces of one forward, by their place; none where the traces are not alike."""
    new = _fill_in_means(old, new)
    if [(f.operation, f.where) for f in old] != [(f.operation, f.where) for f in new]:
        return {}
    pairs = zip(old, new, strict=True)
    return {i: (a, b) for i, (a, b) in enumerate(pairs) if not math.isclose(a.value, b.value, rel_tol=1e-6)}


def _fill_in_means(old: Sequence[Factor], new: Sequence[Factor]) -> Sequence[Factor]:
    """With the means over channels of which one is left, which is no mean any more."""
    filled, rest = list[Factor](), list(new)
    for factor in old:
        there = bool(rest) and (factor.operation, factor.where) == (rest[0].operation, rest[0].where)
        if there:
            filled.append(rest.pop(0))
        elif factor.operation == "mean":
            filled.append(replace(factor, value=1.0))
        else:
            break
    return [*filled, *rest]


def _leave_out_means(changed: _Changes) -> _Changes:
    """Without the means over channels: that of a norm changes with the width, and does no harm."""
    return {i: pair for i, pair in changed.items() if pair[0].operation != "mean"}


def _explain(error: float | None, changed: _Changes, derived: Sequence[str]) -> str:
    """Why a group is left alone, in words."""
    off = "" if error is None else f"; the output is off by {error:.1e} (relative)"
    if error == math.inf:
        off = "; with only those cut that can be compared, it does not run, or gives no numbers"
    if changed:
        words = dict.fromkeys(f"{a.value:.4g} in {a.where} becomes {b.value:.4g}" for a, b in changed.values())
        return f"the forward derives a factor from the width: {', '.join(itertools.islice(words, 3))}{off}"
    why = f": {derived[0]}" if derived else ""
    return f"the smaller network is not the original without these channels{why}{off}{advise_to_fold(why)}"


# ---- the original without the removed channels ----------------------------------------------------------------------


def _zero_removed(
    weights: Mapping[str, Tensor], graph: ChannelGraph, maps: Maps, buffers: Collection[str]
) -> tuple[dict[str, Tensor], dict[_Place, np.ndarray]]:
    """Weights of the original's shapes in which nothing comes in from removed channels.

    Where a map mixes, its new channels stand at the first m places of the group. Where channels are summed or
    multiplied with others, nothing goes into the removed ones either. A buffer that reads a weight, for that to be
    divided by what it finds, as a spectral norm does, goes on reading all of it: it makes the channels that stay, too.

    Args:
        weights: the network's tensors, float64.
        buffers: names of those that are buffers.
    Returns:
        the tensors that change, batch norms folded; and the places of derived weights, which are zero only after what
        they are derived by.
    """
    groups = [g for g in graph.groups if g.name in maps]
    names = {m.tensor for g in groups for m in g.members}
    norms = [n for n in graph.norms if names & set(norm_tensors(n))]
    names |= {name for norm in norms for name in norm_tensors(norm)}
    new = fold_norms({name: weights[name] for name in names}, norms)
    turned = find_turned(groups, maps)
    fold_streams_(new, turned)
    centred = find_averaged_biases([g for g in groups if g not in turned], norms)
    identity = {name for norm in norms for name in (norm.weight, norm.variance)}  # what folding left of the norms
    masks: dict[_Place, np.ndarray] = {}
    for group in groups:
        if group in turned:
            _confine_(new, group, widen_turn(maps[group.name]))
            continue
        members = [m for m in group.members if m.tensor not in identity]
        removed = _remove_(new, replace(group, members=tuple(members)), maps[group.name], centred)
        zeroed = _INPUTS | (_OUTPUTS if any(note.startswith(_SUMMED) for note in group.notes) else frozenset())
        made_in = [m.module for m in members if Role.PRODUCES in m.roles and m.tensor in graph.derived]
        for member in members:
            makes = member.tensor in buffers and any(is_inside(member.module, module) for module in made_in)
            if not member.roles & zeroed or (makes and member.roles & READS):
                continue
            places = member.positions[removed].ravel()
            if member.tensor in graph.derived:
                masks[member.key()] = np.union1d(masks.get(member.key(), places), places)
            else:
                _zero_(new[member.tensor], member, places)
    return new, masks


def _remove_(weights: dict[str, Tensor], group: ChannelGroup, reduction: ReductionMap, centred: set[str]) -> np.ndarray:
    """Carry out a map at the full width (in place); the channels that are left over, by number."""
    picked, read = reduction.picked, reduction.read
    if picked is not None and read is not None and torch.equal(picked, read):
        return np.setdiff1d(np.arange(group.size), picked.cpu().numpy())
    for member in group.members:
        weights[member.tensor] = mix_channels(
            weights[member.tensor], member, reduction, average=member.tensor in centred
        )
    return np.arange(len(reduction.merge), group.size)


def _confine_(weights: dict[str, Tensor], group: ChannelGroup, wide: ReductionMap) -> None:
    """Confine the channels of a rotated group, its norms folded, to the directions that are kept (in place)."""
    for member in group.members:
        weights[member.tensor] = mix_channels(weights[member.tensor], member, wide)


def _zero_(tensor: Tensor, member: Member, places: np.ndarray) -> None:
    part = tensor if member.within is None else narrow_to(tensor, member.within)
    part.index_fill_(member.dim, torch.from_numpy(places).to(tensor.device), 0.0)


def _scale_map(reduction: ReductionMap, scale: _Scale | None) -> ReductionMap:
    found = None if scale in (None, (1.0, 1.0)) else torch.tensor(scale, dtype=torch.float64)
    return replace(reduction, scale=found)


class _Masking(Tracer):
    """Follows where weights come from and makes zero, in what layers use, the entries of removed channels."""

    def __init__(self, model: nn.Module, masks: Mapping[_Place, np.ndarray]) -> None:
        super().__init__(Ledger(model))
        self.masks: dict[tuple[str, int], list[tuple[Slice | None, Tensor]]] = defaultdict(list)
        for (tensor, dim, within), places in masks.items():
            self.masks[tensor, dim].append((within, torch.from_numpy(places)))

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_operation(func) in (*PRODUCTS, "linear", "convolution"):
            args, kwargs = tree_map(self.masked, args), tree_map(self.masked, kwargs)
        return func(*args, **kwargs)

    def masked(self, value: Any) -> Any:
        info = self.ledger.look_up(value) if isinstance(value, Tensor) else None
        if not isinstance(info, Weight) or info.nonlinear is None:
            return value
        for axis in info.axes:
            for within, places in self.masks.get((axis.tensor, axis.dim), ()):
                hit = torch.isin(axis.coordinates, places)
                if within is not None:
                    across = next(p.coordinates for p in info.axes if (p.tensor, p.dim) == (axis.tensor, within.dim))
                    hit = hit & (across >= within.start) & (across < within.stop)
                value = value.masked_fill(hit.to(value.device), 0.0)
        return value
