"""The solver of layers: two forward passes, in which each layer becomes what gives the original's outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import cast_like, channels_last, count_images, double_first
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, find_layers, watch_calls
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.network.state import preserve_state
from intrafusion.progress import report
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.activation import Activation
from intrafusion.restore.norm_fits import NormFits, find_channel_norms
from intrafusion.restore.ridge import Lacking, Ridge
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.uses import Unread, UseWatcher

Change = tuple[Tensor, Tensor]
"""What was added to a layer's weight, (c, d), and as a constant to its output before the norm, (c,); float64."""

_RIGHT = 1e-5  # a layer whose outputs are off by less than this fraction of their size is left alone


@dataclass(frozen=True)
class Solved:
    """What was written: changes of layers, by name, and gains and shifts of norms, by tensor."""

    changes: Mapping[str, Change]
    norms: Mapping[str, Tensor]

    __repr__ = show_briefly


@dataclass(frozen=True)
class LayerSolver:
    """Solves layers for the outputs of another network; the hyper-parameters are those of `LeastSquares`."""

    strength: float
    scarcity: float
    steps: int
    rows: int
    drift: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("strength", "scarcity"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if self.steps < 0:
            raise RecipeError(f"steps: expected a number >= 0, got {self.steps!r}.")
        if self.rows < 2:
            raise RecipeError(f"rows: expected at least 2 sampled rows per layer, got {self.rows!r}.")

    def solve_(
        self,
        small: nn.Module,
        maps: Mapping[str, ReductionMap],
        reference: nn.Module,
        graph: ChannelGraph,
        inputs: Inputs,
        *,
        left: Collection[str] = (),
        reached: Inputs | None = None,
    ) -> Solved:
        """Solve the layers of a network in evaluation mode, and fit its norms, in place.

        Args:
            maps: that made it of the network that the graph is of.
            reference: gives the outputs that are wanted; left as it was.
            inputs: all images as one call.
            left: layers that stay as they are.
            reached: the same call of the smaller network, where that is part of one whose earlier parts are smaller
                already and it reads something else.
        Raises:
            ModelError: one of the networks gives NaN on the images.
        """
        inputs = double_first(inputs.map(channels_last))
        reached = inputs if reached is None else double_first(reached.map(channels_last))
        layers, originals = find_layers(small, graph), find_layers(reference, graph)
        common = {name: layer for name, layer in originals.items() if name in layers and name not in left}
        norms = find_channel_norms(small, graph, maps)
        fits = NormFits(norms, inputs.weights, self.strength, self.scarcity, self.rows, self.seed)
        with fits.recording(reference):
            targets = record_targets(reference, common, cast_like(inputs, reference), self)
        merges = {name: find_output_merge(originals[name], graph, maps) for name in targets.rows}
        solving = _SolvingPass({n: layers[n] for n in targets.rows}, targets, merges, self)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), fits.fitting():
            solving.run(small, cast_like(reached, small))
        return Solved(solving.changes, fits.list_written(small))


@dataclass(eq=False)
class Targets:
    """What the original network gave.

    places: sampled places of each layer's output (k, dims); see `Layer.sample_places`.
    weights: how much each of them counts, (k, 1); None for all alike.
    images: which image each place is of, (k,); see `find_images`.
    rows: what its norm gave there (k, c); what the sum was for layers in `summed`.
    activations: the function that alone reads that, where there is one.
    """

    places: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    activations: dict[str, Activation] = field(default_factory=dict)

    __repr__ = show_briefly


def record_targets(reference: nn.Module, layers: Mapping[str, Layer], inputs: Inputs, solver: LayerSolver) -> Targets:
    """One forward pass of the original network."""
    targets, skipped = Targets(), set[str]()  # layers that run more than once, or are not what they look like

    def store(name: str, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise ModelError(f"{name}: the original network gives NaN or infinity on these images; check their scale.")
        targets.rows[name] = rows

    def called(name: str, x: Tensor, output: Tensor) -> None:
        layer, again = layers[name], name in targets.rows
        counts = layer.weigh_rows(output, inputs.weights)
        places = layer.sample_places(output, solver.rows, solver.seed, counts)
        targets.places[name] = places
        targets.weights[name] = None if counts is None else weigh_evenly(counts[tuple(places.T)])
        targets.images[name] = find_images(places, layer.shape_places(output), count_images(inputs))
        store(name, layer.apply_norm(layer.take_outputs(output, places)))
        if again or not layer.is_plain(x, output, places):
            skipped.add(name)
        else:
            uses.watch(output, name)

    def entered(found: Unread, total: Tensor) -> str:
        """Of two layers that enter the sum, the one with the larger filters makes up for the other."""
        name = max((name for _, name in found), key=lambda n: layers[n].fan_in)
        targets.summed.add(name)
        store(name, layers[name].take_outputs(total, targets.places[name]))
        return name

    uses = UseWatcher(layers, after_sum=entered if solver.drift else None)
    modules = {name: layer.module for name, layer in layers.items()}
    with preserve_state(reference), watch_calls(modules, called), uses:
        outputs = inputs.call(reference)
    uses.mark_read(outputs)
    rows = {name: found for name, found in targets.rows.items() if name not in skipped}
    summed = targets.summed & rows.keys()
    return Targets(targets.places, targets.weights, targets.images, rows, summed, uses.activations)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What a layer is solved on: what is known of it at its sampled places, a row for each.

    Attributes:
        inputs: what it reads (k, d), columns as in `Layer.matrix`.
        given: what its norm, or the sum that it enters, is before it is solved (k, c).
        wanted: what that was in the original network (k, n).
        weights: how much each row counts, (k, 1) of mean 1; None for all alike.
        images: which image each row comes from, (k,) int64.
    """

    inputs: Tensor
    given: Tensor
    wanted: Tensor
    weights: Tensor | None
    images: Tensor

    __repr__ = show_briefly


def find_images(places: Tensor, shape: Sequence[int], count: int) -> Tensor:
    """Which of `count` images places (k, dims) in a shape belong to, (k,) int64.

    The images run along the first dimension of that length or, where there is none, along the first that is a multiple
    of it, as windows of images do; else each place stands for itself.

    >>> find_images(torch.tensor([[0, 3], [5, 0], [7, 1]]), (8, 4), 2)
    tensor([0, 1, 1])
    """
    fitting = [d for d, size in enumerate(shape) if size == count]
    fitting += [d for d, size in enumerate(shape) if size % count == 0 and size]
    if not fitting:
        return torch.arange(len(places), device=places.device)
    return places[:, fitting[0]] // (shape[fitting[0]] // count)


class _SolvingPass:
    """One forward pass of the smaller network, in which each layer is solved when it is reached.

    A layer that enters a sum is solved when the sum is computed: by then the other branch is known.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        targets: Targets,
        merges: Mapping[str, Tensor | None],
        solver: LayerSolver,
    ) -> None:
        self.layers, self.targets, self.merges, self.solver = layers, targets, merges, solver
        self.uses = UseWatcher(layers, before_sum=self.entered)
        self.waiting: dict[str, Tensor] = {}
        self.changes: dict[str, Change] = {}
        self.solved = 0

    def run(self, model: nn.Module, inputs: Inputs) -> None:
        modules = {name: layer.module for name, layer in self.layers.items()}
        with watch_calls(modules, self.called, reached=self.reached), self.uses:
            inputs.call(model)
        report("restoring layers", len(self.layers), len(self.layers))

    def reached(self, name: str, x: Tensor) -> None:
        if name in self.targets.summed:
            self.waiting[name] = x
        else:
            layer = self.layers[name]
            inputs = layer.take_inputs(x, self.targets.places[name])
            self.solve_layer_(layer, self.gather(name, inputs, layer.apply_norm(layer.compute(inputs))))

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.waiting:
            self.uses.watch(output, name)

    def entered(self, found: Unread, a: Tensor, b: Tensor) -> None:
        for output, name in found:
            if name in self.waiting:
                layer, x, places = self.layers[name], self.waiting.pop(name), self.targets.places[name]
                given = layer.take_outputs(a, places) + layer.take_outputs(b, places)
                if self.solve_layer_(layer, self.gather(name, layer.take_inputs(x, places), given)):
                    output.copy_(layer.apply_norm(layer.module.forward(x)))

    def gather(self, name: str, inputs: Tensor, given: Tensor) -> LayerRows:
        targets = self.targets
        return LayerRows(inputs, given, targets.rows[name], targets.weights[name], targets.images[name])

    def solve_layer_(self, layer: Layer, rows: LayerRows) -> bool:
        """Solve one layer on these rows and write it; False if it is right already."""
        report("restoring layers", self.solved, len(self.layers))
        self.solved += 1
        activation, given = self.targets.activations.get(layer.name), rows.given
        target, solver = self.merge(layer.name, rows.wanted), self.solver
        if float((target - given).norm()) <= _RIGHT * float(target.norm()):
            return False
        how = {"scarcity": solver.scarcity, "intercept": layer.takes_constant, "weights": rows.weights}
        ridge = Ridge(rows.inputs, solver.strength, **how)
        if activation is None or not solver.steps:
            change = ridge.solve(lambda _: layer.before_norm(target - given))
        else:
            wanted = self.merge(layer.name, activation(rows.wanted))
            change = ridge.solve(_make_lacking(layer, given, target, activation, wanted), solver.steps)
        if not all(bool(torch.isfinite(t).all()) for t in change):
            raise ModelError(
                f"{layer.name}: restoring gives NaN or infinity, as the smaller network does on these images; "
                f"check the scale of the images, and the sizes asked for."
            )
        layer.add_(*change)
        self.changes[layer.name] = change
        return True

    def merge(self, name: str, rows: Tensor) -> Tensor:
        merge = self.merges[name]
        return rows if merge is None else rows @ merge.T.to(rows)


def _make_lacking(layer: Layer, given: Tensor, target: Tensor, activation: Activation, wanted: Tensor) -> Lacking:
    """What a layer that gives `given` lacks, before its norm, until its activation function gives what is wanted.

    Args:
        target: what is wanted of the layer itself, to begin with.
    """

    def lacking(change: Tensor | None) -> Tensor:
        if change is None:
            return layer.before_norm(target - given)
        return layer.before_norm((wanted - activation(given + layer.after_norm(change))) / activation.slope)

    return lacking
