"""Keeps the accuracy with unlabelled images: every layer of the smaller network solved for the original's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import ImagesLike, cast_like, channels_last, join_batches, read_batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.activation import Activation
from intrafusion.restore.layers import Layer, hooked, output_map, solvable
from intrafusion.restore.readers import Followed, Readers
from intrafusion.restore.restorer import Reduced, needed
from intrafusion.restore.ridge import Lacking, Ridge
from intrafusion.surgery.write import write_weights_

Change = tuple[Tensor, Tensor]
"""What was added to a layer's weight, (c, d), and as a constant to its output before the norm, (c,); float64."""

RIGHT = 1e-5  # a layer whose outputs are off by less than this fraction of their size is left alone


@dataclass(frozen=True)
class LeastSquares:
    r"""Solve every layer of the smaller network for the outputs of the original one, on unlabelled images.

    Two forward passes in all. The first stores rows y of the original network's outputs. The second runs the smaller
    network; when it reaches a layer, whose inputs x then come from restored layers, the layer becomes

        W, b  <-  argmin  mean || M y - (W x + b) ||^2 + lam || W - W_0 ||^2,

    from k rows of d inputs, with M the merge of the group that the layer produces, W_0 its weights after the reduction
    and lam = (strength + scarcity d / k) mean var x. Behind a batch norm, y is what the norm gives. Where the output
    enters a sum with another branch s, the sum is the target: M (y + s) minus the other branch of the smaller network
    as it has become. Where only an activation function f reads y, `steps` further solutions lead towards

        mean (M f(y) - f(W x + b)) x^T  =  lam (W - W_0),

    the least matching loss of f: an error counts as far as f lets it through (see `Ridge.solve`).

    Convolutions with one group and linear layers that run once in a forward pass are solved; depthwise and grouped
    convolutions, tied and reparametrised weights, and subclasses that do more than their weight times patches, are left
    alone. All images go through in one batch; the stored rows
    take `rows` * 4 bytes per output channel; a layer with d inputs to each output takes `rows` * 4 d bytes for them
    and 16 d^2 bytes for the solution.
    OURS: no paper is known to us that does this for channel fusion.

    Attributes:
        strength: of the ridge, as a fraction of the inputs' mean variance.
        scarcity: what is added to it where rows are few for the size of a filter, as in a classifier on few images.
        steps: further solutions for what comes out of an activation function.
        rows: sampled places per layer.
        drift: solve for sums instead of for their summands.
        seed: for the sampling of rows.
    """

    strength: float = 1e-3
    scarcity: float = 0.2
    steps: int = 3
    rows: int = 20_000
    drift: bool = True
    seed: int = 0

    needs_data = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        for name in ("strength", "scarcity"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if self.steps < 0:
            raise RecipeError(f"steps: expected a number >= 0, got {self.steps!r}.")
        if self.rows < 2:
            raise RecipeError(f"rows: expected at least 2 sampled rows per layer, got {self.rows!r}.")

    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None
    ) -> None:
        """Write the solved weights into `compressed.model`, or on any error none of them.

        Args:
            reference: the original network; left as it was.
            graph: the channel graph of the original network.
            images: unlabelled, as the networks take them; a few hundred are enough. See `batches`.
        Raises:
            ModelError: no images, images of different shapes, or a network that gives NaN on them.
        """
        inputs = join_batches(read_batches(needed(images, self)))
        small = copy_model(compressed.model).eval()
        solved = self.solve_(small, compressed.plan.maps, reference, graph, inputs)
        layers = solvable(small, graph)
        written = {id(t) for name in solved for t in layers[name].tensors}
        write_weights_(compressed.model, {n: t.detach() for n, t in named_tensors(small).items() if id(t) in written})

    def restore(
        self,
        compressed: Reduced,
        original: nn.Module,
        graph: ChannelGraph,
        images: Inputs,
        reference: nn.Module,
        error: Callable[[nn.Module], float],
    ) -> tuple[float, float]:
        """The same on images in one call, measured.

        Args:
            reference: the original network as it is to be seen on these images; here, itself.
            error: of a network on the images.
        Returns:
            the error of the smaller network before and after.
        """
        before = error(compressed.model)
        self(compressed, reference, graph, images)
        return before, error(compressed.model)

    def solve_(
        self,
        small: nn.Module,
        maps: Mapping[str, ReductionMap],
        reference: nn.Module,
        graph: ChannelGraph,
        inputs: Inputs,
    ) -> dict[str, Change]:
        """Solve the layers of a network in evaluation mode, in place; what was added to each, by name."""
        inputs = inputs.map(channels_last)
        layers, originals = solvable(small, graph), solvable(reference, graph)
        common = [name for name in originals if name in layers]
        targets = recorded(reference, {n: originals[n] for n in common}, cast_like(inputs, reference), self)
        merges = {name: output_map(originals[name], graph, maps) for name in targets.rows}
        solver = Solver({n: layers[n] for n in targets.rows}, targets, merges, self)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            solver.run(small, cast_like(inputs, small))
        return solver.solved


@dataclass(eq=False)
class Targets:
    """What the original network gave.

    places: sampled places of each layer's output (k, dims); see `Layer.places`.
    rows: what its norm gave there (k, c); what the sum was for layers in `summed`.
    activations: the function that alone reads that, where there is one.
    """

    places: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    activations: dict[str, Activation] = field(default_factory=dict)


def recorded(reference: nn.Module, layers: Mapping[str, Layer], inputs: Inputs, options: LeastSquares) -> Targets:
    """One forward pass of the original network."""
    targets, skipped = Targets(), set[str]()  # layers that run more than once, or are not what they look like

    def store(name: str, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise ModelError(f"{name}: the original network gives NaN or infinity on these images; check their scale.")
        targets.rows[name] = rows

    def called(name: str, x: Tensor, output: Tensor) -> None:
        layer, places = layers[name], layers[name].places(output, options.rows, options.seed)
        again = name in targets.rows
        targets.places[name] = places
        store(name, layer.normed(layer.outputs(output, places)))
        if again or not layer.is_plain(x, output, places):
            skipped.add(name)
        else:
            readers.follow(output, name)

    def entered(found: Followed, total: Tensor) -> str:
        """Of two layers that enter the sum, the one with the larger filters makes up for the other."""
        name = max((name for _, name in found), key=lambda n: layers[n].fan_in)
        targets.summed.add(name)
        store(name, layers[name].outputs(total, targets.places[name]))
        return name

    readers = Readers(layers, after=entered if options.drift else None)
    with preserve_state(reference), hooked(layers, called), readers:
        outputs = inputs.call(reference)
    readers.returned(outputs)
    rows = {name: found for name, found in targets.rows.items() if name not in skipped}
    return Targets(targets.places, rows, targets.summed & rows.keys(), readers.activations)


class Solver:
    """One forward pass of the smaller network, in which each layer is solved when it is reached.

    A layer that enters a sum is solved when the sum is computed: by then the other branch is known.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        targets: Targets,
        merges: Mapping[str, Tensor | None],
        options: LeastSquares,
    ) -> None:
        self.layers, self.targets, self.merges, self.options = layers, targets, merges, options
        self.readers = Readers(layers, before=self.entered)
        self.waiting: dict[str, Tensor] = {}
        self.solved: dict[str, Change] = {}

    def run(self, model: nn.Module, inputs: Inputs) -> None:
        with hooked(self.layers, self.called, reached=self.reached), self.readers:
            inputs.call(model)

    def reached(self, name: str, x: Tensor) -> None:
        if name in self.targets.summed:
            self.waiting[name] = x
        else:
            layer = self.layers[name]
            inputs = layer.inputs(x, self.targets.places[name])
            self.solve(layer, inputs, layer.normed(layer.linear(inputs)))

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.waiting:
            self.readers.follow(output, name)

    def entered(self, found: Followed, a: Tensor, b: Tensor) -> None:
        for output, name in found:
            if name in self.waiting:
                layer, x, places = self.layers[name], self.waiting.pop(name), self.targets.places[name]
                given = layer.outputs(a, places) + layer.outputs(b, places)
                if self.solve(layer, layer.inputs(x, places), given):
                    output.copy_(layer.normed(layer.module.forward(x)))

    def solve(self, layer: Layer, inputs: Tensor, given: Tensor) -> bool:
        """Solve one layer, which gives `given` of these inputs, and write it; False if that is right already."""
        rows, activation = self.targets.rows[layer.name], self.targets.activations.get(layer.name)
        target, options = self.merged(layer.name, rows), self.options
        if float((target - given).norm()) <= RIGHT * float(target.norm()):
            return False
        ridge = Ridge(inputs, options.strength, scarcity=options.scarcity, intercept=layer.shifts)
        if activation is None or not options.steps:
            change = ridge.solve(lambda _: layer.before_norm(target - given))
        else:
            wanted = self.merged(layer.name, activation(rows))
            change = ridge.solve(lacks(layer, given, target, activation, wanted), options.steps)
        if not all(bool(torch.isfinite(t).all()) for t in change):
            raise ModelError(
                f"{layer.name}: restoring gives NaN or infinity, as the smaller network does on these images; "
                f"check the scale of the images, and the sizes asked for."
            )
        layer.add_(*change)
        self.solved[layer.name] = change
        return True

    def merged(self, name: str, rows: Tensor) -> Tensor:
        merge = self.merges[name]
        return rows if merge is None else rows @ merge.T.to(rows)


def lacks(layer: Layer, given: Tensor, target: Tensor, activation: Activation, wanted: Tensor) -> Lacking:
    """What a layer that gives `given` lacks, before its norm, until its activation function gives what is wanted.

    Args:
        target: what is wanted of the layer itself, to begin with.
    """

    def lacking(change: Tensor | None) -> Tensor:
        if change is None:
            return layer.before_norm(target - given)
        return layer.before_norm((wanted - activation(given + layer.after_norm(change))) / activation.slope)

    return lacking
