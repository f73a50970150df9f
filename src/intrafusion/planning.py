"""The choice: scores, sizes and maps. What a recipe asks of a network becomes a plan; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.budget import uniform_sizes
from intrafusion.budget.idle import explain_idle_sizes
from intrafusion.budget.rank_curves import choose_layers, share_ranks
from intrafusion.budget.sensitivity import Sensitivity, choose_teller
from intrafusion.budget.target import build_with_sizes, read_limits, require_inputs, sizes_for_target
from intrafusion.budget.uniform import find_pattern, fit_patterns
from intrafusion.errors import ModelError, RecipeError, show
from intrafusion.graph import BLOCKS, ChannelGraph, ChannelGroup, describe_fixed, families_of
from intrafusion.importance.features import channel_biases, describing_rows
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike
from intrafusion.network.calibration_images import choose_inputs, warn_caller
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.room import check_room
from intrafusion.network.tensors import check_graph, named_tensors
from intrafusion.network.wrappers import outside_inference, unwrap
from intrafusion.observe.moments import count_matrices
from intrafusion.observe.observe import observe_for
from intrafusion.observe.whole_blocks import flatten_blocks
from intrafusion.plan import FACTORISED, Decision, Plan, describe_members, is_miss, name_rank_group
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.recipe import ONLY, Recipe
from intrafusion.reduce import Auto, Moments, ReducerTraits, ReductionMap, ReductionProblem, selecting_form
from intrafusion.reduce.eliminate import unit_map
from intrafusion.reduce.principal import principal_map
from intrafusion.restore import Calibration
from intrafusion.selectors import NOT_INCLUDED, explain_idle_selectors, find_left_alone, find_meant
from intrafusion.surgery.configuration import round_sizes, tie_by_config
from intrafusion.surgery.lowrank import explain_unsplit
from intrafusion.surgery.maps import hollow_
from intrafusion.surgery.norms import fold_norms
from intrafusion.surgery.spare import find_classes, find_dead, reduce_distinct

_Scores = Callable[[ChannelGroup, Mapping[str, Tensor]], Tensor]
"""How much each channel of a group matters in these weights, (n,) finite."""


_BLIND = (
    "channels are only selected, as nothing was seen of what is read of them. compress() looks on inputs=, or on what "
    "it can make for a network; decide() on calibration=intrafusion.restore.calibrate(model, example_inputs, "
    "images=...)."
)

_UNCOMPARED = "reducer auto: pivot, as candidates were not compared; compress() does."
_UNCOMPARED_BESIDE_RANKS = "reducer auto: pivot, as candidates are not compared beside ranks; leave one of them out."


@checked
@outside_inference
@shows_progress("decide")
def decide(
    model: nn.Module,
    graph: ChannelGraph,
    recipe: Recipe,
    example_inputs: ExampleInputs | None = None,
    *,
    calibration: Calibration | None = None,
    inputs: ImagesLike | None = None,
    images: ImagesLike | None = None,
    progress: ShowProgress = None,
) -> Plan:
    """Score the channels of every group, set its size, and choose its map. Nothing is written.

    Args:
        example_inputs: only needed for a target in MACs or latency.
        calibration: what reducers that look at what is read of the channels, and targets, measure it on, see
            `intrafusion.restore.calibrate`; None: "pivot" only selects.
        inputs, images: for criteria that need data; one argument of two names, as in `compress`.
    Raises:
        ModelError: no group can be reduced; gives the most frequent reasons.
        BudgetError: sizes that are no sizes.
        RecipeError: heads are to be merged, layers factorised, or channels chosen in the order "forward", which
            `compress` does by itself.
    """
    if recipe.merge_heads is not None:
        raise RecipeError("merge_heads: no plan merges heads; compress(..., merge_heads=...) does, at one size.")
    if recipe.ranks is not False:
        raise RecipeError("ranks: which layers become two is chosen by compress(..., ranks=...); call that.")
    if recipe.order == "forward":
        raise RecipeError(
            "order: 'forward' solves layers between its choices; compress(..., order='forward') does that."
        )
    given = choose_inputs(inputs, images)
    plan = make_plan(unwrap(model), graph, recipe, example_inputs, calibration=calibration, images=given)
    warn_of_misses(plan)
    return plan


def warn_of_misses(plan: Plan) -> None:
    for note in filter(is_miss, () if _SEARCHED.get() else plan.warnings):
        warn_caller(note)


@contextmanager
def sizes_are_searched() -> Iterator[None]:
    """Inside, nobody asked for the sizes that targets name, so missing one is nothing to warn of."""
    token = _SEARCHED.set(True)
    try:
        yield
    finally:
        _SEARCHED.reset(token)


_SEARCHED: ContextVar[bool] = ContextVar("sizes are searched", default=False)


def make_plan(
    model: nn.Module,
    graph: ChannelGraph,
    recipe: Recipe,
    example_inputs: ExampleInputs | None = None,
    *,
    calibration: Calibration | None = None,
    images: ImagesLike | None = None,
    split: Mapping[str, int] | None = None,
    original: nn.Module | None = None,
) -> Plan:
    """As `decide`, without warning of a target that is missed.

    Args:
        split: layers that the network has as two of full rank, and that rank: what lies between becomes less, too.
        original: the network before that, of which limits are fractions.
    """
    model, split = borrow(model), split or {}
    view = _View.of(model, graph, recipe, calibration, images, split)
    graph, groups, unwanted, moments = view.graph, view.groups, view.unwanted, view.moments
    between = {name_rank_group(name) for name in split}
    widths = [g for g in groups if g.name not in between]
    weights, missed = view.weights, ()
    if recipe.target is not None:
        example = require_inputs(example_inputs, recipe)
        wanted, missed = sizes_for_target(
            model, graph, groups, view.judge(calibration, example), recipe, example, original
        )
    else:
        keep = fit_patterns(recipe.keep, graph, split)
        wanted = uniform_sizes(widths, keep, graph, round_to=recipe.round_to, min_channels=recipe.min_channels)
        wanted |= _share_ranks(model, graph, wanted, split, unwanted, recipe)
    wanted, rounded = round_sizes(wanted, graph, recipe.round_to) if recipe.uniform else (wanted, ())
    smaller = [g for g in widths if wanted.get(g.name, g.size) < g.size]
    dead = find_dead(model, graph, smaller, weights, None if example_inputs is None else Inputs.of(example_inputs))
    lower = [g for g in groups if g.name in between and wanted.get(g.name, g.size) < g.size]
    ranks = {g.name: _lower_rank(g, wanted[g.name], weights, moments.get(g.name)) for g in lower}
    described = (view.raw or named_tensors(model)) if ReducerTraits.of(recipe.reducer).raw else weights
    maps = _solve_all(smaller, wanted, weights, described, view.score, dead, recipe, moments, view.raw) | ranks
    smaller = [*smaller, *lower]
    told = [g for g in view.units if g.is_channel or recipe.target is None or g in smaller]
    decisions = tuple(
        decision(
            *(g, wanted.get(g.name, g.size), recipe, unwanted.get(g.name)),
            read=g.name in moments,
            between=g.name in between,
        )
        for g in told
    )
    idle = missed or (() if lower and recipe.target is None else explain_idle_sizes(groups, wanted, graph, recipe))
    unused = explain_idle_selectors(graph, model, recipe.include, recipe.exclude)
    traits = ReducerTraits.of(recipe.reducer)
    blind = [_BLIND] if calibration is None and traits.mixes and traits.needs_moments and smaller else []
    auto = _UNCOMPARED if recipe.ranks is False else _UNCOMPARED_BESIDE_RANKS
    uncompared = [auto] if isinstance(recipe.reducer, Auto) else []
    notes = *graph.warnings, *idle, *unused, *blind, *rounded, *uncompared
    return Plan(recipe, decisions, graph.shapes, maps, notes, describe_fixed(graph), split)


@dataclass(frozen=True, eq=False)
class _View:
    """A network as sizes of its groups are chosen.

    Attributes:
        units: groups that may be told of; groups: those that may shrink; unwanted: why others may not.
        moments: what is read of channels, by group.
        weights: in float64, batch norms folded.
        seen: what criteria that need data observed, by group.
        raw: the weights as they are, which each group changes for those after it; None where none does.
    """

    model: nn.Module
    graph: ChannelGraph
    recipe: Recipe
    units: Sequence[ChannelGroup]
    groups: Sequence[ChannelGroup]
    unwanted: Mapping[str, str]
    moments: Mapping[str, Moments]
    weights: dict[str, Tensor]
    seen: Mapping[str, Any]
    raw: dict[str, Tensor] | None = None

    __repr__ = show_briefly

    @classmethod
    def of(
        cls,
        model: nn.Module,
        graph: ChannelGraph,
        recipe: Recipe,
        calibration: Calibration | None,
        images: ImagesLike | None,
        split: Iterable[str] = (),
        *,
        may_stay: bool = False,
    ) -> _View:
        """
        Args:
            may_stay: whether there may be no group that can shrink.
        Raises:
            ModelError: there is none.
        """
        check_graph(graph, model)
        graph = tie_by_config(graph, model) if recipe.uniform else graph
        unwanted = _find_unwanted(graph, model, recipe, {name_rank_group(name) for name in split})
        units = [g for g in graph.groups if g.is_channel or is_asked_for(g, recipe) or is_offered(g, recipe)]
        groups = [g for g in units if g.reducible and g.name not in unwanted]
        if not groups and not may_stay:
            raise ModelError(_nothing_to_reduce(units, unwanted))
        looks = calibration is not None and recipe.needs_moments
        held = count_matrices(model, graph, groups) if looks else {}
        check_room({g.name: g.size for g in groups if g.is_channel}, held, _find_device(model))
        moments = calibration.moments_of(graph) if calibration is not None and looks else {}
        if moments and calibration is not None and (blocks := [g for g in groups if not g.is_channel]):
            moments = {**moments, **calibration.moments_of(flatten_blocks(graph, blocks))}
        seen = observe_for(recipe.importance, model, graph, groups, images, seed=recipe.seed)
        raw = _copy_raw(model, groups) if recipe.order == "backward" else None  # seen as the groups before left it
        seen = {name: o if raw is None or o.tensors is None else replace(o, tensors=raw) for name, o in seen.items()}
        weights = fold_weights(model, graph, groups)
        return cls(model, graph, recipe, units, groups, unwanted, moments, weights, seen, raw)

    def score(self, group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
        return _check_scores(self.recipe.importance(group, weights, self.seen.get(group.name)), group)

    def judge(self, calibration: Calibration | None, example: Inputs) -> Sensitivity:
        own = {g.name: self.score(g, self.weights) for g in self.groups}
        return Sensitivity(
            *(self.model, self.graph, own, self.moments, calibration, example),
            blocks=[g for g in self.groups if not g.is_channel],
            teller=choose_teller(self.recipe.reducer),
            solves=bool(self.recipe.levels),
        )


def choose_split(
    model: nn.Module,
    graph: ChannelGraph,
    recipe: Recipe,
    inputs: Inputs,
    calibration: Calibration | None,
    images: ImagesLike | None,
) -> list[str]:
    """The layers that may become two: with a target, those whose rank is worth lowering; else all that can.

    Raises:
        ModelError: none can, and nothing else would become smaller; gives the reasons.
    """
    reasons = explain_unsplit(model)
    meant = find_meant(model, recipe.include, recipe.exclude)
    names = [name for name, why in reasons.items() if why is None and name in meant]
    if not names and recipe.ranks is True:
        return []
    if not names:
        told = [f"{repr(name) if name else 'it'}: {why or 'not included'}" for name, why in reasons.items()]
        raise ModelError(f"ranks: no layer of this network can become two. {'; '.join(told[:5]) or 'It has none'}.")
    if recipe.target is None:
        return names
    wider = replace(recipe, ranks=True)  # of what becomes narrower beside, if anything does
    view = _View.of(model, graph, wider, calibration, images, may_stay=True)
    widths = [] if recipe.ranks == ONLY else view.groups
    limits = [limit for limit in read_limits(recipe, model, inputs) if limit.goal < limit.whole]
    if not limits:
        return []
    known = view.judge(calibration, inputs)
    return choose_layers(model, view.graph, widths, names, known, limits, inputs, recipe.min_channels)


def _find_device(model: nn.Module) -> torch.device:
    return next(iter(named_tensors(model).values())).device


def _find_unwanted(
    graph: ChannelGraph, model: nn.Module, recipe: Recipe, between: Collection[str] = ()
) -> dict[str, str]:
    """Groups to be left alone, and why; where sizes must be uniform, their twins too.

    Args:
        between: groups of channels between the two halves of layers.
    """
    found = find_left_alone(graph, model, recipe.include, recipe.exclude)
    if recipe.ranks == ONLY:
        found |= {g.name: "only ranks become lower" for g in graph.groups if g.name not in between}
    for family in families_of(g for g in graph.reducible if g.is_channel) if recipe.uniform else ():
        first = next((g for g in family if g.name in found), None)
        if first is not None:
            found |= {g.name: f"like {first.name}: {found[first.name]}" for g in family if g.name not in found}
    return found


@checked
def list_sizes(model: nn.Module, graph: ChannelGraph, recipe: Recipe) -> dict[str, int]:
    """The size of every group that `keep` asks for."""
    graph = tie_by_config(graph, model) if recipe.uniform else graph
    unwanted = _find_unwanted(graph, model, recipe)
    groups = [g for g in graph.reducible if (g.is_channel or is_asked_for(g, recipe)) and g.name not in unwanted]
    found = uniform_sizes(groups, recipe.keep, graph, round_to=recipe.round_to, min_channels=recipe.min_channels)
    return round_sizes(found, graph, recipe.round_to)[0] if recipe.uniform else found


def _solve_all(
    groups: Sequence[ChannelGroup],
    wanted: Mapping[str, int],
    weights: dict[str, Tensor],
    described: Mapping[str, Tensor],
    scores: _Scores,
    dead: Mapping[str, Tensor],
    recipe: Recipe,
    moments: Mapping[str, Moments],
    raw: dict[str, Tensor] | None,
) -> dict[str, ReductionMap]:
    """The map of every group that shrinks; with the order "backward", each leaves its mark in `weights` and `raw`.

    Args:
        described: what reducers see of the channels: `weights`, or for those that are `raw` the network's own tensors.
    """
    maps: dict[str, ReductionMap] = {}
    for index, group in enumerate(_in_order(groups, recipe)):
        report("choosing channels", index, len(groups))
        asked = scores(group, weights), wanted[group.name], dead.get(group.name)
        maps[group.name] = _solve(group, weights, described, *asked, recipe, moments)
        if recipe.order == "backward":
            for tensors in filter(None, (weights, raw)):
                hollow_(tensors, group, maps[group.name])
    report("choosing channels", len(groups), len(groups))
    return maps


def _copy_raw(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """The tensors of these groups as they are in the network, float64, for writing."""
    tensors = named_tensors(model)
    names = {m.tensor for g in groups for m in g.members}
    return {name: tensors[name].detach().to(torch.float64, copy=True) for name in names}


def is_asked_for(group: ChannelGroup, recipe: Recipe) -> bool:
    """Whether sizes for whole blocks are asked for by name."""
    return recipe.target is None and isinstance(recipe.keep, Mapping) and find_pattern(group, recipe.keep) is not None


def is_offered(group: ChannelGroup, recipe: Recipe) -> bool:
    """Whether a target may cut whole blocks, such as heads; not where one number must say how many all layers have."""
    whole = not group.is_channel and group.name.partition("#")[0].endswith(BLOCKS)
    return recipe.target is not None and whole and group.reducible and not recipe.uniform


def _in_order(groups: Sequence[ChannelGroup], recipe: Recipe) -> Sequence[ChannelGroup]:
    return groups if recipe.order == "joint" else sorted(groups, key=lambda g: g.depth if g.depth is not None else -1)


def _nothing_to_reduce(units: Iterable[ChannelGroup], unwanted: dict[str, str]) -> str:
    units = sorted(units, key=lambda g: unwanted.get(g.name) == NOT_INCLUDED)  # why what was meant is not reduced first
    reasons = [f"{g.name!r}: {g.reason or unwanted.get(g.name)}" for g in units]
    shown = (
        "; ".join(reasons[:5]) if reasons else "the network has no weights that follow one another; see print(graph)"
    )
    if any(g.reducible for g in units):
        return f"include and exclude leave no channel group to reduce; select other layers. {shown}."
    return f"there is no channel group to reduce in this network. {shown}."


@checked
def fold_weights(model: nn.Module, graph: ChannelGraph, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """The tensors of these groups in float64, batch norms folded."""
    names = {m.tensor for g in groups for m in g.members}
    norms = [n for n in graph.norms if n.mean in names or n.producer_weight in names]
    names |= {t for n in norms for t in (n.producer_weight, n.producer_bias, n.weight, n.bias, n.mean, n.variance) if t}
    tensors = named_tensors(model)
    return fold_norms({name: tensors[name] for name in names}, norms)


def _solve(
    group: ChannelGroup,
    weights: dict[str, Tensor],
    described: Mapping[str, Tensor],
    scores: Tensor,
    m: int,
    dead: Tensor | None,
    recipe: Recipe,
    moments: Mapping[str, Moments],
) -> ReductionMap:
    """The map of one group; channels that must not be mixed are selected, dead ones and exact copies go first.

    Of whole blocks those stay that the layer which reads them misses most where it is solved anew.
    """
    traits = ReducerTraits.of(recipe.reducer)
    if not group.is_channel and traits.needs_moments and group.name in moments:
        return unit_map(moments[group.name], group.size, m)
    rows = describing_rows(group, described, raw=traits.raw, balanced=traits.balanced)
    features, added = torch.cat([own for _, own in rows], dim=1), channel_biases(group, weights)
    problem = ReductionProblem(
        features, scores, m, recipe.seed, added, moments.get(group.name), group.linear, group.rotation
    )
    if _rotates(group, recipe, moments):
        return _check_map(recipe.reducer(problem), group)
    reducer = selecting_form(recipe.reducer) if group.unmixable else recipe.reducer
    classes = find_classes(group, weights, dead, copies=reducer.mixes)
    return _check_map(reduce_distinct(reducer, group, weights, problem, classes, rows), group)


def _share_ranks(
    model: nn.Module,
    graph: ChannelGraph,
    widths: Mapping[str, int],
    split: Mapping[str, int],
    unwanted: Container[str],
    recipe: Recipe,
) -> dict[str, int]:
    """The rank of each layer that is two, by the group between, where all keep the same share of their weights."""
    if recipe.rank_share is None:
        return {}
    chosen = {name: full for name, full in split.items() if name_rank_group(name) not in unwanted}
    found = share_ranks(build_with_sizes(model, graph, widths), chosen, recipe.rank_share)
    return {name_rank_group(name): rank for name, rank in found.items()}


def _lower_rank(group: ChannelGroup, m: int, weights: Mapping[str, Tensor], moments: Moments | None) -> ReductionMap:
    """The best map of rank m between the two halves of a layer, whatever reduces other groups.

    Of what was seen of the inputs; where nothing was, as if all were alike and independent (Eckart and Young 1936).
    """
    if moments is None:
        first, last = (weights[f"{half}.weight"].flatten(1) for half in (group.producers[0], group.consumers[0]))
        moments = Moments(first.new_zeros(1, group.size), (first @ first.T)[None], last.T @ last)
    return _check_map(principal_map(moments, m), group)


def _rotates(group: ChannelGroup, recipe: Recipe, moments: Mapping[str, Moments]) -> bool:
    """Whether a group is rotated where it shrinks."""
    seen = moments.get(group.name)
    return group.rotation is not None and seen is not None and ReducerTraits.of(recipe.reducer).rotates


def _check_map(reduction: ReductionMap, group: ChannelGroup) -> ReductionMap:
    parts = (reduction.merge, reduction.unmerge, *(() if reduction.shift is None else (reduction.shift,)))
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ModelError(
            f"group {group.name!r}: expected a finite map from the reducer, got NaN or infinity: its weights, or what "
            "is read of its channels, are too large or undefined; check the scale of weights and images."
        )
    return reduction


def _check_scores(scores: object, group: ChannelGroup) -> Tensor:
    where = f"importance: group {group.name!r}: expected a tensor of {group.size} finite scores"
    if not isinstance(scores, Tensor) or scores.shape != (group.size,):
        raise RecipeError(f"{where}, got {show(scores)}; a criterion gives one score per channel.")
    if not bool(torch.isfinite(scores).all()):
        raise RecipeError(f"{where}, got NaN or infinity; look at what it divides by.")
    return scores.detach().double()


def decision(
    group: ChannelGroup, m: int, recipe: Recipe, unwanted: str | None, *, read: bool, between: bool = False
) -> Decision:
    """What is decided of one group.

    Args:
        read: whether it is known what is read of these channels.
        between: whether they lie between the two halves of a layer.
    """
    traits = ReducerTraits.of(recipe.reducer)
    mixing = "mixed" if traits.mixes else "selected"
    if between:
        mixing = FACTORISED
    elif group.rotation is not None and traits.rotates and read:
        mixing = "rotated"
    elif traits.mixes and group.unmixable:
        mixing = f"selected: {group.unmixable}"
    elif traits.mixes and traits.needs_moments and not read:
        mixing = "selected: what is read of these channels was not seen"
    reason = group.reason or unwanted
    kept = group.size if reason else m
    return Decision(
        group.name, group.size, kept, describe_members(group), mixing, reason, group.family, group.depth, group.kind
    )
