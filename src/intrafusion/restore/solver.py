"""The solver of layers: two forward passes, in which each layer becomes what gives the original's outputs."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.names import name_some
from intrafusion.network.calibration_images import warn_caller
from intrafusion.network.free_pages import return_free_pages
from intrafusion.network.inputs import Inputs, told_of
from intrafusion.network.layers import Layer, find_layers, is_solvable, unseen_by_modes, watch_calls
from intrafusion.network.outputs import read_iterators
from intrafusion.network.state import evaluate_alone, remember_random_numbers
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.progress import report
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.live import LiveTensors, is_plain
from intrafusion.restore.lockstep import Turn, run_in_lockstep
from intrafusion.restore.norm_fits import NormFits, find_channel_norms
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf, find_bound
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.strength import STRENGTHS, Change, Task, choose_strength, leave_out
from intrafusion.restore.targets import Targets, name_batch, prepare, record_targets
from intrafusion.restore.too_large import TooLarge
from intrafusion.restore.uses import Unread, UseWatcher

_UNREAD = 1e8  # when it is due what a network was called on, as most is read at the beginning only
_RIGHT = 1e-5  # a layer whose outputs are off by less than this fraction of their size is left alone


@dataclass(frozen=True)
class Solved:
    """What was written: changes of layers, by name, and gains and shifts of norms, by tensor.

    Attributes:
        skipped: layers that were left alone, and why.
    """

    changes: Mapping[str, Change]
    norms: Mapping[str, Tensor]
    skipped: Mapping[str, str] = field(default_factory=dict)

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
        inputs: Sequence[Inputs],
        *,
        left: Collection[str] = (),
        reached: Sequence[Inputs] | None = None,
        memory: int | None = None,
    ) -> Solved:
        """Solve the layers of a network in evaluation mode, and fit its norms, in place.

        Every layer is solved on all images at once, which come to it through the layers before as they are solved. What
        a batch holds between two layers is put into a file where all of it is too much, see `Shelf`.

        Args:
            maps: that made it of the network that the graph is of.
            reference: gives the outputs that are wanted; left as it was.
            inputs: all images, a call for each batch. Several need about as many images each, and networks in which
                no image meets another; what else they need of memory grows with the largest.
            left: layers that stay as they are.
            reached: the same calls of the smaller network, where that is part of one whose earlier parts are smaller
                already and it reads something else.
            memory: bytes of activations that are held at most besides those of the batch that runs; where one batch
                needs more, all are cut. None: half a gigabyte, see `find_bound`, and batches stay as they are.
        Raises:
            ModelError: one of the networks gives NaN on the images; the disk is full.
            RecipeError: one image needs more than `memory`.
        """
        reached = inputs if reached is None else reached
        while True:
            with contextlib.closing(Shelf(find_bound() if memory is None else memory)) as shelf:
                try:
                    return self._solve_(small, maps, reference, graph, inputs, reached, left, shelf, memory)
                except TooLarge as found:
                    cut = found
            cut.check(reference)
            inputs, reached = cut.cut(inputs), cut.cut(reached)

    def _solve_(
        self,
        small: nn.Module,
        maps: Mapping[str, ReductionMap],
        reference: nn.Module,
        graph: ChannelGraph,
        inputs: Sequence[Inputs],
        reached: Sequence[Inputs],
        left: Collection[str],
        shelf: Shelf,
        memory: int | None,
    ) -> Solved:
        """On batches as they are, for which memory may turn out too small before anything is written."""
        layers, originals = (find_layers(m, graph, is_solvable) for m in (small, reference))
        common = {name: layer for name, layer in originals.items() if name in layers and name not in left}
        stores = [RowStore(PlaceSampler(inputs, self.rows, self.seed), shelf) for _ in range(2)]
        fits = NormFits(find_channel_norms(small, graph, maps), stores[1], self.fixed_strength, self.scarcity)
        targets = record_targets(reference, common, inputs, stores[0], fits, drift=self.drift, memory=memory)
        merges = {name: find_output_merge(originals[name], graph, maps) for name in targets.names}
        solving = _Solving({n: layers[n] for n in targets.names}, targets, merges, fits, self)
        with evaluate_alone(small):
            solving.run(small, reached)
        if targets.parted:
            warn_caller(
                f"restoring: {name_some(sorted(targets.parted))} left as before: batches reach them in different ways; "
                "give such a network all inputs as one batch."
            )
        return Solved(solving.changes, fits.list_written(small), targets.skipped)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What a layer is solved on: what is known of it at its sampled places, a row for each.

    Attributes:
        inputs: what it reads (k, d), or (g, k, d) with groups; columns as in `Layer.matrix`.
        given: what its norm, or the sum that it enters, is before it is solved (k, c).
        wanted: what that was in the original network (k, n).
        weights: how much each row counts, (k, 1) of mean 1; None for all alike.
        images: which of all images each row comes from, (k,) int64 below `RowStore.count`.
    """

    inputs: Tensor
    given: Tensor
    wanted: Tensor
    weights: Tensor | None
    images: Tensor

    __repr__ = show_briefly


class _Solving:
    """The passes of the smaller network, in which each layer is solved when all batches have reached it."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        targets: Targets,
        merges: Mapping[str, Tensor | None],
        fits: NormFits,
        solver: LayerSolver,
    ) -> None:
        self.layers, self.targets, self.merges, self.fits, self.solver = layers, targets, merges, fits, solver
        self.shelf, self.summed = targets.store.shelf, targets.summed
        self.left_out = leave_out(sum(targets.store.sampler.counts))
        self.inputs: dict[str, Tensor] = {}  # rows that a layer reads, as far as batches have come
        self.changes: dict[str, Change] = {}
        self.solved = 0

    def run(self, small: nn.Module, batches: Sequence[Inputs]) -> None:
        self.coming, count = iter(batches), len(batches)  # passes begin one after another
        passes = [_Pass(self, small, batch, count) for batch in range(count)]
        run_in_lockstep(
            [one.run for one in passes],
            self.meet,
            self.targets.order,
            around=lambda batch: passes[batch].going(),
            parted=self.part,
        )
        report("restoring layers", len(self.layers), len(self.layers))

    def meet(self, key: tuple[str, str], brought: Sequence[Any]) -> Sequence[Any]:
        """All batches stand at a layer with what it gives, or at a norm."""
        kind, name = key
        if kind != "layer":
            return self.fits.meet(key, brought)
        store = self.targets.store
        rows = LayerRows(
            self.inputs.pop(name), torch.cat(list(brought)), store.take(name), store.weights[name], store.images[name]
        )
        return [self.solve_layer_(self.layers[name], rows)] * len(brought)

    def part(self, key: tuple[str, str]) -> None:
        """Some batches stand at a layer, others at another one or at the end."""
        kind, name = key
        self.inputs.pop(name, None)
        if kind == "layer":
            self.targets.parted.add(name)
            self.targets.skipped[name] = "batches reach it in different ways in the smaller network"

    def bring_inputs(self, name: str, batch: int, inputs: Tensor) -> None:
        """Into one matrix for all batches, so that they are not there twice."""
        places = self.targets.store.places[name]
        if len(places) == 1:
            self.inputs[name] = inputs
            return
        counts = [len(own) for own in places]
        if name not in self.inputs:
            self.inputs[name] = inputs.new_empty(*inputs.shape[:-2], sum(counts), inputs.shape[-1])
        start = sum(counts[:batch])
        self.inputs[name][..., start : start + counts[batch], :] = inputs

    def solve_layer_(self, layer: Layer, rows: LayerRows) -> bool:
        """Solve one layer on these rows and write it; False if it is right already."""
        report("restoring layers", self.solved, len(self.layers))
        self.solved += 1
        given, target = rows.given, self.merge(layer.name, rows.wanted)
        if float((target - given).norm()) <= _RIGHT * float(target.norm()):
            return False
        activation = self.targets.activations.get(layer.name) if self.solver.steps else None
        wanted = target if activation is None else self.merge(layer.name, activation(rows.wanted))
        change = self.find_change(Task(layer, given, target, activation, wanted, rows.weights), rows)
        if change is None:
            return False
        if not all(bool(torch.isfinite(t).all()) for t in change):
            where = self.blame(layer.name, rows)
            raise ModelError(
                f"{layer.name}: restoring gives NaN or infinity, as the smaller network does on {where}; "
                f"check the scale of the images, and the sizes asked for."
            )
        layer.add_(*change)
        self.changes[layer.name] = change
        return True

    def find_change(self, task: Task, rows: LayerRows) -> Change | None:
        """What rows call for; None where a layer is better left as it is."""
        solver, apart = self.solver, self.left_out.to(rows.images.device)[self.find_images(rows)]
        ridge = task.ridge(rows.inputs, solver.fixed_strength, solver.scarcity)
        if solver.strength is None and bool(apart.any()) and not bool(apart.all()):
            strength = choose_strength(task, rows.inputs, ridge, apart, solver.steps)
            if strength is None:
                return None
            ridge = ridge.with_strength(strength)
        return task.solve(ridge, solver.steps)

    def find_images(self, rows: LayerRows) -> Tensor:
        """The image of each row (k,); where that is not known, stretches of rows stand for images."""
        count, total = len(self.left_out), len(rows.images)
        if not total or int(rows.images.max()) < count:
            return rows.images
        return torch.arange(total, device=rows.images.device) * count // total

    def blame(self, name: str, rows: LayerRows) -> str:
        """Where the first row comes from that is not finite."""
        inputs = rows.inputs.movedim(-2, 0).flatten(1)  # of all groups
        finite = torch.isfinite(inputs).all(1) & torch.isfinite(rows.given).all(1)
        if bool(finite.all()):
            return "these images"
        ends = list(itertools.accumulate(map(len, self.targets.store.places[name])))
        return name_batch(self.targets.store.sampler.counts, bisect.bisect(ends, int(finite.int().argmin())))

    def merge(self, name: str, rows: Tensor) -> Tensor:
        merge = self.merges[name]
        return rows if merge is None else rows @ merge.T.to(rows)


class _Pass:
    """The smaller network on one batch; all batches share its weights, and else have copies of their own.

    A layer that enters a sum is solved when the sum is computed: by then the other branch is known.
    """

    def __init__(self, solving: _Solving, small: nn.Module, batch: int, count: int) -> None:
        self.solving, self.small, self.batch, self.count = solving, small, batch, count
        self.layers, self.shelf, self.store = solving.layers, solving.shelf, solving.targets.store
        self.live = LiveTensors(self.before)
        self.uses = UseWatcher(self.layers, before_sum=self.entered)
        self.waiting: dict[str, Tensor] = {}
        self.random = remember_random_numbers(small)
        self.given: frozenset[int] = frozenset()  # storages of what the network is called on
        self.steps = 0

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Around each stretch to the next layer: what the batch holds is there, and its random numbers go on."""
        self.shelf.take(self)
        self.random()
        yield
        self.random = remember_random_numbers(self.small)
        self.leave()
        return_free_pages()

    def leave(self) -> None:
        """What the batch holds goes to the shelf; what the network was called on stays there until it is read."""
        held, self.steps = self.live.list_storages(), self.steps + 1
        if self.given not in self.shelf.items:
            self.shelf.lay(self.given, [s for s in held if s._cdata in self.given], _UNREAD)
        rest = [s for s in held if s._cdata not in self.given]
        self.shelf.lay(self, rest, self.steps + self.batch / self.count)

    def run(self, turn: Turn) -> None:
        self.turn = turn
        model, live = self.small, contextlib.nullcontext()
        if self.count > 1:
            live, model = self.live, copy_model(model, share=named_tensors(model).keys() - self.solving.targets.written)
        modules = {name: module for name, module in model.named_modules() if name in self.layers}
        fitting = self.solving.fits.fitting(model, self.batch, turn, self.live.note)
        with live, fitting, watch_calls(modules, self.called, reached=self.reached), self.uses:
            given = prepare(next(self.solving.coming), model).copied()
            self.given = frozenset(t.untyped_storage()._cdata for t in given.tensors() if is_plain(t))
            with told_of(model, given):
                read_iterators(model(*given.args, **(given.kwargs or {})))

    def before(self, given: Sequence[Tensor]) -> None:
        """What an operation reads may lie on the shelf with another batch, where modules keep what they computed."""
        self.turn.check()
        if self.shelf.emptied:
            self.shelf.ensure([t.untyped_storage() for t in given if is_plain(t)])

    def reached(self, name: str, x: Tensor) -> None:
        if name in self.solving.summed:
            self.waiting[name] = x
        else:
            layer = self.layers[name]
            inputs = layer.take_inputs(x, self.store.places[name][self.batch])
            self.wait(layer, inputs, layer.apply_norm(layer.compute(inputs)))

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.waiting:
            self.uses.watch(output, name)

    def entered(self, found: Unread, a: Tensor, b: Tensor) -> None:
        with unseen_by_modes():  # rows that are brought are no part of what the batch holds
            for output, name in found:
                if name in self.waiting:
                    layer, x, places = self.layers[name], self.waiting.pop(name), self.store.places[name][self.batch]
                    given = layer.take_outputs(a, places) + layer.take_outputs(b, places)
                    if self.wait(layer, layer.take_inputs(x, places), given):
                        output.copy_(layer.apply_norm(layer.module.forward(x)))

    def wait(self, layer: Layer, inputs: Tensor, given: Tensor) -> bool:
        """Until the layer is solved on all batches; whether it was written."""
        self.solving.bring_inputs(layer.name, self.batch, inputs)
        return bool(self.turn.wait(("layer", layer.name), given))
