"""The solver of layers: two forward passes, in which each layer becomes what gives the original's outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import cast_like, channels_last, count_images, double_first
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, find_layers, is_solvable, watch_calls
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.network.state import preserve_state
from intrafusion.progress import report
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.activation import Activation
from intrafusion.restore.norm_fits import NormFits, find_channel_norms
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.strength import STRENGTHS, Change, Task, choose_strength, leave_out
from intrafusion.restore.uses import Unread, UseWatcher

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

    strength: float | None
    scarcity: float
    steps: int
    rows: int
    drift: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("strength", "scarcity"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RecipeError(f"{name}: expected a number >= 0, got {value!r}.")
        if self.steps < 0:
            raise RecipeError(f"steps: expected a number >= 0, got {self.steps!r}.")
        if self.rows < 2:
            raise RecipeError(f"rows: expected at least 2 sampled rows per layer, got {self.rows!r}.")

    @property
    def fixed_strength(self) -> float:
        """For what is not chosen."""
        return STRENGTHS[0] if self.strength is None else self.strength

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
        layers, originals = (find_layers(m, graph, is_solvable) for m in (small, reference))
        common = {name: layer for name, layer in originals.items() if name in layers and name not in left}
        norms = find_channel_norms(small, graph, maps)
        fits = NormFits(norms, inputs.weights, self.fixed_strength, self.scarcity, self.rows, self.seed)
        with fits.recording(reference):
            targets = record_targets(reference, common, cast_like(inputs, reference), self)
        merges = {name: find_output_merge(originals[name], graph, maps) for name in targets.rows}
        solving = _SolvingPass({n: layers[n] for n in targets.rows}, targets, merges, self, count_images(inputs))
        with torch.random.fork_rng(devices=[]), torch.no_grad(), fits.fitting():
            solving.run(small, cast_like(reached, small))
        return Solved(solving.changes, fits.list_written(small))


@dataclass(eq=False)
class Targets:
    """What the original network gave.

    places: sampled places of each layer's output (k, dims); see `Layer.sample_places`.
    weights: how much each of them counts, (k, 1); None for all alike.
    rows: what its norm gave there (k, c); what the sum was for layers in `summed`.
    activations: the function that alone reads that, where there is one.
    """

    places: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor | None] = field(default_factory=dict)
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
        places = layer.sample_places(output, layer.limit_rows(solver.rows), solver.seed, counts)
        targets.places[name] = places
        targets.weights[name] = None if counts is None else weigh_evenly(counts[tuple(places.T)])
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
    return Targets(targets.places, targets.weights, rows, targets.summed & rows.keys(), uses.activations)


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
        images: int,
    ) -> None:
        self.layers, self.targets, self.merges, self.solver = layers, targets, merges, solver
        self.left_out = leave_out(images)
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
            self.solve_layer_(layer, inputs, layer.apply_norm(layer.compute(inputs)))

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.waiting:
            self.uses.watch(output, name)

    def entered(self, found: Unread, a: Tensor, b: Tensor) -> None:
        for output, name in found:
            if name in self.waiting:
                layer, x, places = self.layers[name], self.waiting.pop(name), self.targets.places[name]
                given = layer.take_outputs(a, places) + layer.take_outputs(b, places)
                if self.solve_layer_(layer, layer.take_inputs(x, places), given):
                    output.copy_(layer.apply_norm(layer.module.forward(x)))

    def solve_layer_(self, layer: Layer, inputs: Tensor, given: Tensor) -> bool:
        """Solve one layer, which gives `given` of these inputs, and write it; False if that is right already."""
        report("restoring layers", self.solved, len(self.layers))
        self.solved += 1
        rows, activation = self.targets.rows[layer.name], self.targets.activations.get(layer.name)
        target = self.merge(layer.name, rows)
        if float((target - given).norm()) <= _RIGHT * float(target.norm()):
            return False
        activation = activation if self.solver.steps else None
        wanted = target if activation is None else self.merge(layer.name, activation(rows))
        task = Task(layer, given, target, activation, wanted, self.targets.weights[layer.name])
        change = self.find_change(task, inputs, _find_images(self.targets.places[layer.name], len(self.left_out)))
        if change is None:
            return False
        if not all(bool(torch.isfinite(t).all()) for t in change):
            raise ModelError(
                f"{layer.name}: restoring gives NaN or infinity, as the smaller network does on these images; "
                f"check the scale of the images, and the sizes asked for."
            )
        layer.add_(*change)
        self.changes[layer.name] = change
        return True

    def find_change(self, task: Task, inputs: Tensor, images: Tensor) -> Change | None:
        """What rows of these images (k,) call for; None where a layer is better left as it is."""
        solver, apart = self.solver, self.left_out.to(images.device)[images]
        ridge = task.ridge(inputs, solver.fixed_strength, solver.scarcity)
        if solver.strength is None and bool(apart.any()) and not bool(apart.all()):
            strength = choose_strength(task, inputs, ridge, apart, solver.steps)
            if strength is None:
                return None
            ridge = ridge.with_strength(strength)
        return task.solve(ridge, solver.steps)

    def merge(self, name: str, rows: Tensor) -> Tensor:
        merge = self.merges[name]
        return rows if merge is None else rows @ merge.T.to(rows)


def _find_images(places: Tensor, count: int) -> Tensor:
    """The image of each row (k,): its first index; where that runs further, stretches of rows stand for images."""
    first = places[:, 0]
    return first if int(first.max()) < count else torch.arange(len(first), device=first.device) * count // len(first)
