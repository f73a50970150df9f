"""The solver of layers: two forward passes, in which each layer becomes what gives the original's outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import cast_like, channels_last, double_first
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, find_layers, has_own_forward, is_solvable, sample_places, watch_calls
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.progress import report
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.activation import Activation
from intrafusion.restore.bare import BareLayer, BareWatcher
from intrafusion.restore.grouped_ridge import GroupedRidge
from intrafusion.restore.norm_fits import NormFits, find_channel_norms
from intrafusion.restore.ridge import Lacking, Ridge
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.uses import Unread, UseWatcher
from intrafusion.trace.decomposition import unfuse_attention

Change = tuple[Tensor, Tensor]
"""What was added to a layer's weight, (c, d), and as a constant to its output before the norm, (c,); float64."""

_RIGHT = 1e-5  # a layer whose outputs are off by less than this fraction of their size is left alone


@dataclass(frozen=True)
class Solved:
    """What was written: changes of layers, by name, gains and shifts of norms, by tensor, and all tensors of layers."""

    changes: Mapping[str, Change]
    norms: Mapping[str, Tensor]
    written: Mapping[str, Tensor]

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
        bare: bool = True,
    ) -> Solved:
        """Solve the layers of a network in evaluation mode, and fit its norms, in place.

        Args:
            maps: that made it of the network that the graph is of.
            reference: gives the outputs that are wanted; left as it was.
            inputs: all images as one call.
            left: layers that stay as they are.
            reached: the same call of the smaller network, where that is part of one whose earlier parts are smaller
                already and it reads something else.
            bare: whether weights that functions multiply with are solved too, see `BareLayer`.
        Raises:
            ModelError: one of the networks gives NaN on the images.
        """
        inputs = double_first(inputs.map(channels_last))
        reached = inputs if reached is None else double_first(reached.map(channels_last))
        layers, originals = (find_layers(m, graph, is_solvable) for m in (small, reference))
        common = {name: layer for name, layer in originals.items() if name in layers and name not in left}
        norms = find_channel_norms(small, graph, maps)
        fits = NormFits(norms, inputs.weights, self.strength, self.scarcity, self.rows, self.seed)
        with fits.recording(reference):
            targets = record_targets(
                reference, common, cast_like(inputs, reference), self, graph if bare else None, left
            )
        merges = {name: find_output_merge(targets.layers[name], graph, maps) for name in targets.rows}
        known = {name: layers[name] for name in targets.rows if name in layers}
        solving = _SolvingPasses(known, targets, merges, self, fits, graph)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), fits.fitting():
            solving.run(small, cast_like(reached, small))
        return Solved(solving.changes, fits.list_written(small), solving.list_written())


@dataclass(eq=False)
class Targets:
    """What the original network gave.

    places: sampled places of what each call of each layer gave, (k, dims); see `Layer.sample_places`.
    weights: how much each of them counts, (k, 1), those of all calls one after another; None for all alike.
    rows: what its norm gave there (k, c), likewise; what the sum was for layers in `summed`.
    activations: the function that alone reads that, where there is one.
    layers: those of the original network that there are rows of.
    ran: modules whose weights are theirs alone.
    """

    places: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    activations: dict[str, Activation] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    __repr__ = show_briefly

    @property
    def repeated(self) -> list[str]:
        """Layers that run more than once, in the order of their first calls."""
        return [name for name in self.rows if len(self.places[name]) > 1]


def record_targets(
    reference: nn.Module,
    layers: Mapping[str, Layer],
    inputs: Inputs,
    solver: LayerSolver,
    graph: ChannelGraph | None = None,
    left: Collection[str] = (),
) -> Targets:
    """One forward pass of the original network.

    Args:
        graph: its graph, if weights are to be seen that functions multiply with.
        left: modules whose weights are not.
    """
    recording = _Recording(reference, layers, inputs, solver, graph, left)
    with preserve_state(reference) as before:
        with recording.watching():
            outputs = inputs.call(reference)
        recording.uses.mark_read(outputs)
        return recording.finish(again=not before.rebound)


class _Recording:
    """What layers give while the original network runs."""

    def __init__(
        self,
        reference: nn.Module,
        layers: Mapping[str, Layer],
        inputs: Inputs,
        solver: LayerSolver,
        graph: ChannelGraph | None,
        left: Collection[str],
    ) -> None:
        self.layers, self.inputs, self.solver = dict(layers), inputs, solver
        self.ran = set(left)
        self.bare = None if graph is None else BareWatcher(reference, graph, self.ran, called=self.called_bare)
        self.uses = UseWatcher(self.layers, after_sum=self.entered if solver.drift else None)
        self.places: dict[str, list[Tensor]] = {}
        self.counts: dict[str, list[Tensor]] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self.totals: dict[str, Tensor] = {}
        self.skipped: set[str] = set()  # those that are not what they look like

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        modules = {name: layer.module for name, layer in self.layers.items()}
        bare = contextlib.nullcontext() if self.bare is None else self.bare
        with unfuse_attention(), watch_calls(modules, self.called, reached=self.reached), self.uses, bare:
            yield

    def reached(self, name: str, x: Tensor) -> None:
        if not has_own_forward(self.layers[name].module):
            self.ran.add(name)

    def called_bare(self, layer: BareLayer, x: Tensor, output: Tensor) -> None:
        self.layers.setdefault(layer.name, layer)
        self.called(layer.name, x, output)

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        layer, calls = self.layers[name], self.rows.setdefault(name, [])
        counts = layer.weigh_rows(output, self.inputs.weights)
        seed = self.solver.seed + len(calls)
        places = layer.sample_places(output, layer.limit_rows(self.solver.rows), seed, counts)
        self.places.setdefault(name, []).append(places)
        self.counts.setdefault(name, []).extend([] if counts is None else [counts[tuple(places.T)]])
        calls.append(self.check(name, layer.apply_norm(layer.take_outputs(output, places))))
        if layer.is_plain(x, output, places):
            self.uses.watch(output, name)
        else:
            self.skipped.add(name)

    def entered(self, found: Unread, total: Tensor) -> str:
        """Of two layers that enter the sum, the one with the larger filters makes up for the other."""
        name = max((name for _, name in found), key=lambda n: self.layers[n].fan_in)
        self.totals[name] = self.check(name, self.layers[name].take_outputs(total, self.places[name][-1]))
        return name

    def check(self, name: str, rows: Tensor) -> Tensor:
        if not bool(torch.isfinite(rows).all()):
            raise ModelError(f"{name}: the original network gives NaN or infinity on these images; check their scale.")
        return rows

    def finish(self, again: bool) -> Targets:
        """Of layers that run more than once, the rows of all calls together, of what they give themselves.

        Args:
            again: whether another forward pass gives the same, so that these can be solved.
        """
        if self.bare is not None:
            self.skipped |= self.bare.settle(self.layers, self.rows, self.skipped)
        for name in self.rows:
            self.thin(name)
        once = {name for name, calls in self.rows.items() if len(calls) == 1}
        self.skipped |= set() if again else self.rows.keys() - once
        summed = self.totals.keys() & once - self.skipped
        known = {name: calls for name, calls in self.rows.items() if name not in self.skipped}
        rows = {name: self.totals[name] if name in summed else torch.cat(calls) for name, calls in known.items()}
        weights = {n: weigh_evenly(torch.cat(self.counts[n])) if self.counts[n] else None for n in known}
        reads = self.uses.reads
        activations = {n: f for n, f in self.uses.activations.items() if reads[n] == len(self.rows[n])}
        known_layers = {name: self.layers[name] for name in known}
        return Targets(self.places, weights, rows, summed, activations, known_layers, self.ran)

    def thin(self, name: str) -> None:
        """As many rows of all calls together as of a layer that runs once."""
        calls, limit = self.rows[name], self.layers[name].limit_rows(self.solver.rows)
        total = sum(map(len, calls))
        if total <= limit:
            return
        kept = [sample_places(name, (len(c),), len(c) * limit // total, self.solver.seed)[:, 0] for c in calls]
        for lists in (self.rows, self.places, self.counts):
            lists[name] = [rows[own] for rows, own in zip(lists[name], kept, strict=False)]  # without counts, none


class _SolvingPasses:
    """Forward passes of the smaller network, in which each layer is solved when it is reached.

    A layer that enters a sum is solved when the sum is computed: by then the other branch is known. For layers that
    run more than once there are passes up to the first call of one of them, in which all that they read is seen.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        targets: Targets,
        merges: Mapping[str, Tensor | None],
        solver: LayerSolver,
        fits: NormFits,
        graph: ChannelGraph,
    ) -> None:
        self.layers, self.merges = dict(layers), dict(merges)
        self.targets, self.solver, self.fits, self.graph = targets, solver, fits, graph
        self.changes: dict[str, Change] = {}
        self.settled: set[str] = set()

    def run(self, model: nn.Module, inputs: Inputs) -> None:
        """In the order in which layers are first reached; those that read what they gave themselves are one place."""
        self.model, self.inputs, loop = model, inputs, list[str]()
        for name in self.targets.repeated:
            read = self.watch([name])[name]
            if len(read) == len(self.targets.places[name]) and self.is_looped(name, read):
                loop.append(name)
                continue
            if loop:
                self.solve_loop_(loop)
                loop, read = [], self.watch([name])[name]
            if len(read) == len(self.targets.places[name]):
                self.solve_calls_(name, read)
            self.settled.add(name)
        if loop:
            self.solve_loop_(loop)
        self.watch([])
        report("restoring layers", len(self.layers), len(self.layers))

    def watch(self, names: Collection[str]) -> dict[str, list[Tensor]]:
        """A pass, in which layers are solved as far as all before them is; what these read at each of their calls."""
        self.found: dict[str, list[Tensor]] = {name: [] for name in names}
        self.waiting: dict[str, Tensor] = {}
        self.open = self.fits.paused = False  # behind a layer that is not solved yet
        self.uses = UseWatcher(self.layers, before_sum=self.entered)
        modules = {name: layer.module for name, layer in self.layers.items() if not isinstance(layer, BareLayer)}
        bare = contextlib.nullcontext()
        if any(isinstance(layer, BareLayer) for layer in self.targets.layers.values()):
            bare = BareWatcher(
                self.model, self.graph, self.targets.ran, reached=self.reached_bare, called=self.called_bare
            )
        with unfuse_attention(), watch_calls(modules, self.called, reached=self.reached), self.uses, bare:
            self.inputs.call(self.model)
        return self.found

    def reached_bare(self, layer: BareLayer, x: Tensor) -> None:
        name, original = layer.name, self.targets.layers.get(layer.name)
        if not isinstance(original, BareLayer):
            return
        if name not in self.layers:
            self.layers[name] = layer.like(original, named_tensors(self.model))
            merge = layer.cut_merge(self.merges[name], original)
            self.merges[name] = merge
            self.settled |= set() if merge is not None else {name}  # it gives what others gave, too
        self.reached(name, x)

    def reached(self, name: str, x: Tensor) -> None:
        layer, places = self.layers[name], self.targets.places[name]
        if name in self.found and len(self.found[name]) < len(places):
            self.found[name].append(layer.take_inputs(x, places[len(self.found[name])]))
        if name in self.settled:
            return
        self.open = self.fits.paused = self.open or len(places) > 1
        if self.open:
            return
        if name in self.targets.summed:
            self.waiting[name] = x
        else:
            inputs = layer.take_inputs(x, places[0])
            self.solve_layer_(layer, inputs, layer.apply_norm(layer.compute(inputs)))

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.waiting:
            self.uses.watch(output, name)

    def called_bare(self, layer: BareLayer, x: Tensor, output: Tensor) -> None:
        self.called(layer.name, x, output)

    def entered(self, found: Unread, a: Tensor, b: Tensor) -> None:
        for output, name in found:
            if name in self.waiting and not self.open:
                layer, x, places = self.layers[name], self.waiting.pop(name), self.targets.places[name][0]
                given = layer.take_outputs(a, places) + layer.take_outputs(b, places)
                if self.solve_layer_(layer, layer.take_inputs(x, places), given):
                    output.copy_(layer.apply_norm(layer.module.forward(x)))

    def is_looped(self, name: str, read: Sequence[Tensor]) -> bool:
        """Whether what a layer reads at its calls depends on what it gave at earlier ones."""
        weight = self.layers[name].module.weight.data
        own = weight.clone()
        weight.mul_(0.5)
        changed = self.watch([name])[name]
        weight.copy_(own)
        return not all(map(torch.equal, read, changed))

    def solve_calls_(self, name: str, read: Sequence[Tensor]) -> bool:
        """Solve a layer for its first calls, at which it reads this."""
        layer, inputs = self.layers[name], torch.cat(list(read), -2)
        return self.solve_layer_(layer, inputs, layer.apply_norm(layer.compute(inputs)))

    def solve_loop_(self, names: Sequence[str]) -> None:
        """Solve layers that read what they gave, for their first call, then for the first 2, 4, ... and all.

        By then, what they read at these calls is near what it is to be. The weights with the least error at all calls,
        as it then is, stay; the least may be that of before.
        """
        writable = [t for name in names for t in self.layers[name].writable]
        calls = max(len(self.targets.places[name]) for name in names)
        least, best, changes = math.inf, [t.detach().clone() for t in writable], dict(self.changes)
        for name, upto in (*((n, upto) for upto in _double_up_to(calls) for n in names), (names[0], 0)):
            found = self.watch(names)
            error = sum(self.measure(n, read) for n, read in found.items())
            if error < least:
                least, best, changes = error, [t.detach().clone() for t in writable], dict(self.changes)
            elif not math.isfinite(error) and math.isfinite(least):
                break  # a loop that grew without bounds
            if upto:
                self.solve_calls_(name, found[name][:upto])
        self.changes = changes
        for tensor, value in zip(writable, best, strict=True):
            tensor.data.copy_(value)
        self.settled.update(names)

    def measure(self, name: str, read: Sequence[Tensor]) -> float:
        """The squared error of what a layer gives at all its calls, as a fraction of the square of what it should.

        Behind the activation function, where only that reads the layer.
        """
        layer, weights = self.layers[name], self.targets.weights[name]
        activation = self.targets.activations.get(name, lambda rows: rows)
        target = self.merge(name, activation(self.targets.rows[name]))
        given = activation(layer.apply_norm(layer.compute(torch.cat(list(read), -2))))
        error, size = (target - given).square(), target.square()
        error, size = (t if weights is None else t * weights.to(t) for t in (error, size))
        return float(error.sum(dtype=torch.float64) / size.sum(dtype=torch.float64).clamp(min=1e-300))

    def solve_layer_(self, layer: Layer, inputs: Tensor, given: Tensor) -> bool:
        """Solve one layer, which gives `given` of these inputs, and write it; False if that is right already."""
        report("restoring layers", len(self.settled), len(self.layers))
        if len(self.targets.places[layer.name]) == 1:
            self.settled.add(layer.name)
        rows, activation = self.targets.rows[layer.name][: len(given)], self.targets.activations.get(layer.name)
        target, solver = self.merge(layer.name, rows), self.solver
        if float((target - given).norm()) <= _RIGHT * float(target.norm()):
            return False
        weights, how = self.targets.weights[layer.name], {"scarcity": solver.scarcity}
        weights = None if weights is None else weigh_evenly(weights[: len(given), 0])
        fit = Ridge if layer.groups == 1 else GroupedRidge
        ridge = fit(inputs, solver.strength, **how, intercept=layer.takes_constant, weights=weights)
        if activation is None or not solver.steps:
            change = ridge.solve(lambda _: layer.before_norm(target - given))
        else:
            wanted = self.merge(layer.name, activation(rows))
            change = ridge.solve(_make_lacking(layer, given, target, activation, wanted), solver.steps)
        if not all(bool(torch.isfinite(t).all()) for t in change):
            raise ModelError(
                f"{layer.name}: restoring gives NaN or infinity, as the smaller network does on these images; "
                f"check the scale of the images, and the sizes asked for."
            )
        layer.add_(*change)
        before = self.changes.get(layer.name)
        self.changes[layer.name] = change if before is None else (before[0] + change[0], before[1] + change[1])
        return True

    def list_written(self) -> dict[str, Tensor]:
        """Tensors of the network that were written, by name."""
        written = {t.untyped_storage()._cdata for name in self.changes for t in self.layers[name].writable}
        return {n: t for n, t in named_tensors(self.model).items() if t.untyped_storage()._cdata in written}

    def merge(self, name: str, rows: Tensor) -> Tensor:
        merge = self.merges[name]
        return rows if merge is None else rows @ merge.T.to(rows)


def _double_up_to(count: int) -> list[int]:
    """
    >>> _double_up_to(7), _double_up_to(4)
    ([1, 2, 4, 7], [1, 2, 4])
    """
    return [*(2**i for i in range(count.bit_length()) if 2**i < count), count]


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
