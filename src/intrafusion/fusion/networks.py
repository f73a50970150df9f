"""Several networks of one structure into one: aligned channel by channel to an anchor, then averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion import restore as restorers
from intrafusion.application import apply
from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.compressed import Compressed
from intrafusion.errors import ArgumentError, ModelError, unknown_name
from intrafusion.fusion.align import Alignment, FoldedNetwork, align_groups, move_tensors
from intrafusion.fusion.match import GroupPair, match_groups
from intrafusion.fusion.outputs import record_outputs
from intrafusion.fusion.variance import find_lengths, strengthen
from intrafusion.graph import ChannelGraph, Role
from intrafusion.inspection import inspect
from intrafusion.measure.size import size_of
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike, join_batches, read_batches
from intrafusion.network.calibration_images import choose_inputs
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.network.wrappers import outside_inference, unwrap
from intrafusion.plan import Decision, list_layers
from intrafusion.planning import decide
from intrafusion.progress import ShowProgress, prefix_stages, report, shows_progress
from intrafusion.recipe import Keep, Recipe
from intrafusion.reduce import ReductionMap
from intrafusion.restore import Restorer
from intrafusion.surgery.norms import unfold_norms
from intrafusion.surgery.write import write_weights_
from intrafusion.table import GroupLine, TextTable, tabulate_groups

USING = ("weights", "activations")


@checked
@dataclass(frozen=True, eq=False)
class Fused(Compressed):
    """The fused network; what the anchor became is in `plan`, as after `compress`.

    Attributes:
        alignments: for every network that was fused, its map onto the result's channels by name of the group.
        weights: what each network counted, sum 1.
        anchor: index of the network onto whose channels the others were moved.
    """

    alignments: tuple[Mapping[str, ReductionMap], ...] = field(default=())
    weights: tuple[float, ...] = ()
    anchor: int = 0

    __repr__ = show_briefly

    @property
    def moved(self) -> dict[str, float]:
        """By name of the group, the share of the channels that changed their place, of all networks but the anchor."""
        others = [own for index, own in enumerate(self.alignments) if index != self.anchor]
        return {name: _find_moved([own[name] for own in others]) for name in (others[0] if others else ())}

    def _headline(self) -> str:
        what = f"{len(self.weights)} networks fused into one"
        if self.plan.sizes:
            return f"{what}, narrower than network {self.anchor + 1}: {super()._headline()}"
        moved = list(self.moved.values())
        share = sum(moved) / max(1, len(moved))
        return f"{what} of the same size; {share:.0%} of the channels of the others changed their place"

    def _tables(self) -> tuple[TextTable, ...]:
        """Every group, with the share of the channels that changed their place."""
        moved = self.moved
        lines = [_describe_group(d, moved.get(d.group)) for d in self.plan.decisions]
        fixed = (f"in no group, {line}" for line in self.plan.fixed)
        notes = (f"note: {warning}" for warning in self.plan.warnings)
        return (tabulate_groups(_HEADER, lines, (*fixed, *notes)),)


_HEADER = ("group", "channels", "moved", "other layers, or reason")


def _find_moved(maps: Sequence[ReductionMap]) -> float:
    """A channel that goes to several places counts in shares."""
    stay = [float(torch.diagonal(m.merge).sum() / len(m.merge)) for m in maps]
    return 1 - sum(stay) / len(stay)


def _describe_group(decision: Decision, moved: float | None) -> GroupLine:
    if decision.reduced:  # places among fewer channels are others for all networks
        return GroupLine(decision.group, f"{decision.n} -> {decision.m}", "all", list_layers(decision))
    how = "none" if moved is None else f"{moved:.0%}"
    return GroupLine(decision.group, str(decision.n), how, list_layers(decision), decision.reason or "")


@partial(checked, leaving=Recipe.options())
@outside_inference
@shows_progress("fuse")
def fuse(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    using: str = "weights",
    inputs: ImagesLike | None = None,
    images: ImagesLike | None = None,
    weights: Sequence[float] | None = None,
    anchor: int = 0,
    keep: Keep = 1.0,
    alignment: Alignment | None = None,
    rescale: bool = True,
    restore: str | Restorer | None = None,
    seed: Seed = 0,
    progress: ShowProgress = None,
    **recipe: Any,
) -> Fused:
    """Fuse trained networks of one structure, of equal or different widths, into one network.

    The channels of every network are moved onto those of the anchor along optimal transport plans, one per group of
    coupled channels; then tensors are averaged, batch norms folded into the layers before them. Channels of the
    output are never moved. Every network is aligned to the anchor alone: the order of the others does not matter.

    Args:
        models: at least two; none is modified.
        example_inputs: of one forward call, as for `compress`.
        using: what channels are compared by: "weights", or "activations" on `inputs` (about 200 are enough).
        inputs, images: unlabelled, as the networks take them; one argument of two names, as in `compress`.
        weights: what each network counts in the average; equal if None.
        anchor: index of the network whose channels and widths the result has.
        keep: below 1, the result is narrower than the anchor: all networks, the anchor too, are moved onto the
            channels that it keeps.
        alignment: costs, sides and passes; `Alignment()` by default.
        rescale: give the averaged channels the strength of those that they were averaged from; see `strengthen`.
        restore: a restorer, or its name, that then makes the fused network give what the anchor gives.
        seed: for whatever draws random numbers.
        recipe: how the anchor is narrowed where keep < 1, by the names of `Recipe`; plain pruning by default.
    Returns:
        the fused network, in the anchor's dtype, on its device and in its mode.
    Raises:
        ModelError: networks of different depth or structure (with the first difference), or no images where needed.
        ArgumentError: an unknown name, fewer than two networks, or weights that are no weights.

    Reference: Singh and Jaggi 2020, Algorithm 1 (fusion); a residual stream has one coupling (Theus et al. 2024).
    """
    wanted = Recipe.of(keep=keep, seed=seed, **{"reducer": "select", **recipe})
    given = choose_inputs(inputs, images)
    shares = _find_shares(models, using, given, weights, anchor)
    restorer = None if restore is None else restorers.get_restorer(restore)
    example, calibration = Inputs.of(example_inputs), None if given is None else join_batches(read_batches(given))
    models = [borrow(unwrap(model)) for model in models]
    graphs = []
    for index, model in enumerate(models):
        with prefix_stages(f"network {index + 1} of {len(models)}"):
            graphs.append(inspect(model, example))
    names = [f"network {index}" for index in range(len(models))]
    plan = decide(models[anchor], graphs[anchor], wanted)
    if wanted.keep == 1.0:  # nothing was to become smaller: no reason to note that nothing does
        plan = replace(plan, warnings=graphs[anchor].warnings)
    for graph, name in zip(graphs, names, strict=True):
        match_groups(graph, graphs[anchor], name)
    base = apply(models[anchor], plan, example, graph=graphs[anchor])
    narrowed = bool(base.plan.sizes)
    target = inspect(base.model, example) if narrowed else graphs[anchor]
    by_outputs = calibration if using == "activations" else None
    onto = _fold_network(base.model, target, by_outputs, seed)
    mean = _WeightedMean(onto, base.model)
    alignments: list[Mapping[str, ReductionMap]] = []
    for index, (model, graph) in enumerate(zip(models, graphs, strict=True)):
        report("aligning networks", index, len(models))
        own = onto if index == anchor and not narrowed else _fold_network(model, graph, by_outputs, seed)
        pairs = match_groups(graph, target, names[index])
        maps = _make_identities(pairs) if own is onto else align_groups(own, onto, pairs, alignment or Alignment())
        alignments.append(maps)
        mean.add(own, pairs, maps, shares[index])
    fused = copy_model(base.model)
    write_weights_(fused, mean.finish(rescale=rescale))
    found = {f.name: getattr(base, f.name) for f in fields(Compressed)}
    found |= {"model": fused, "after": size_of(fused, example)}
    result = Fused(**found, alignments=tuple(alignments), weights=tuple(shares), anchor=anchor)
    report("aligning networks", len(models), len(models))
    if restorer is not None:
        restorer(result, models[anchor], graphs[anchor], given)
    return result


def _fold_network(model: nn.Module, graph: ChannelGraph, calibration: Inputs | None, seed: int) -> FoldedNetwork:
    outputs = None if calibration is None else record_outputs(model, graph, calibration, seed=seed)
    return FoldedNetwork.of(model, graph, outputs)


def _make_identities(pairs: Sequence[GroupPair]) -> dict[str, ReductionMap]:
    eyes = {p.name: torch.eye(p.own.size, dtype=torch.float64) for p in pairs}
    return {name: ReductionMap(eye, eye) for name, eye in eyes.items()}


class _WeightedMean:
    """The weighted mean of tensors that were carried into the anchor's coordinates, norms folded."""

    def __init__(self, anchor: FoldedNetwork, model: nn.Module) -> None:
        self.anchor, self.model = anchor, model
        self.tensors: dict[str, Tensor] = {}
        self.betas: dict[str, Tensor] = {}
        self.lengths: dict[str, Tensor] = {}
        self.dims: dict[str, int] = {}

    def add(
        self, own: FoldedNetwork, pairs: Sequence[GroupPair], maps: Mapping[str, ReductionMap], share: float
    ) -> None:
        target = self.anchor.graph
        floating = {n: t for n, t in own.weights.items() if t.is_floating_point()}
        _accumulate_(self.tensors, move_tensors(floating, own.graph, target, pairs, maps), share)
        _accumulate_(self.betas, move_tensors(own.betas, own.graph, target, pairs, maps), share)
        _accumulate_(self.lengths, find_lengths(own, target, self.model, pairs, maps), share)
        self.dims.update({m.tensor: m.dim for p in pairs for _, m in p.members if Role.PRODUCES in m.roles})

    def finish(self, *, rescale: bool) -> dict[str, Tensor]:
        """The tensors to write, norms with the anchor's own scale and shift, in the anchor's dtype."""
        norms, tensors = self.anchor.graph.norms, self.tensors
        if rescale:
            tensors = strengthen(tensors, self.lengths, self.betas, norms, self.dims)
        present = {name: t.detach() for name, t in named_tensors(self.model).items()}
        final = unfold_norms({**self.anchor.weights, **tensors}, present, norms, {})
        return {name: t.to(present[name].dtype) for name, t in final.items()}


def _accumulate_(total: dict[str, Tensor], part: Mapping[str, Tensor], share: float) -> None:
    for name, tensor in part.items():
        total[name] = total[name] + share * tensor.to(total[name]) if name in total else share * tensor


def _find_shares(
    models: Sequence[nn.Module], using: str, images: ImagesLike | None, weights: Sequence[float] | None, anchor: int
) -> list[float]:
    """The share of each network in the average."""
    if using not in USING:
        raise ArgumentError(unknown_name("using", using, USING))
    if len(models) < 2:
        raise ArgumentError(f"fuse: expected at least two networks, got {len(models)}.")
    if using == "activations" and images is None:
        raise ModelError('fuse: using="activations" compares what the networks give on images; pass images=.')
    if not 0 <= anchor < len(models):
        raise ArgumentError(f"anchor: expected an index in 0..{len(models) - 1}, got {anchor}.")
    given = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if len(given) != len(models) or not all(w >= 0 for w in given) or not 0 < sum(given) < math.inf:
        raise ArgumentError(f"weights: expected {len(models)} numbers >= 0, not all 0, got {given}.")
    return [w / sum(given) for w in given]
