"""The solver of layers: two forward passes, in which each layer becomes what gives the original's outputs."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.names import name_some
from intrafusion.network.batches import count_images
from intrafusion.network.calibration_images import warn_caller
from intrafusion.network.free_pages import return_free_pages, returning_large_pages
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs, told_of
from intrafusion.network.layers import Layer, find_layers, is_solvable, unseen_by_modes, watch_calls
from intrafusion.network.outputs import read_iterators
from intrafusion.network.state import evaluate_alone, remember_random_numbers
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.observe.bare import BareLayer, BareWatcher
from intrafusion.progress import report
from intrafusion.reduce.problem import ReductionMap, find_picks
from intrafusion.restore.activation import Activation
from intrafusion.restore.live import LiveTensors, is_plain
from intrafusion.restore.lockstep import Turn, run_in_lockstep
from intrafusion.restore.norm_fits import NormFits, find_channel_norms
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.ridge import Change
from intrafusion.restore.row_store import RowStore, join_rows
from intrafusion.restore.shelf import Shelf, find_bound
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.strength import ROWS, STRENGTHS, Task, choose_strength, leave_out
from intrafusion.restore.targets import Targets, name_batch, prepare, record_targets
from intrafusion.restore.too_large import TooLarge
from intrafusion.restore.uses import Unread, UseWatcher
from intrafusion.trace.decomposition import unfuse_attention

Arrange = Callable[[Tensor], Tensor]
"""Of what a layer reads or gives, a view along whose first dimension the images run; see `BareLayer.arrange`."""

_UNREAD = 1e8  # when it is due what a network was called on, as most is read at the beginning only
_ROUNDS = 4  # in which each layer of a loop is solved for all its calls
_SETTLED = 0.01  # a fall of the error of a loop by a smaller share of it is none
_RIGHT = 1e-5  # a layer whose outputs are off by less than this fraction of their size is left alone


@dataclass(frozen=True)
class Solved:
    """What was written: changes of layers, by name, gains and shifts of norms, by tensor, and all tensors of layers.

    Attributes:
        skipped: layers that were left alone, and why.
    """

    changes: Mapping[str, Change]
    norms: Mapping[str, Tensor]
    written: Mapping[str, Tensor]
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
        bare: bool = True,
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
                needs more, all are cut. None: 128 MiB, with what is kept of a loader, and batches stay as they are.
            bare: whether weights that functions multiply with are solved too, see `BareLayer`.
        Raises:
            ModelError: one of the networks gives NaN on the images; the disk is full.
            RecipeError: one image needs more than `memory`.
        """
        reached = inputs if reached is None else reached
        bound = find_bound(inputs.kept_bytes if isinstance(inputs, Batches) else 0) if memory is None else memory
        while True:
            with contextlib.closing(Shelf(bound)) as shelf:
                try:
                    return self._solve_(small, maps, reference, graph, inputs, reached, left, shelf, memory, bare)
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
        bare: bool,
    ) -> Solved:
        """On batches as they are, for which memory may turn out too small before anything is written."""
        layers, originals = (find_layers(m, graph, is_solvable) for m in (small, reference))
        common = {name: layer for name, layer in originals.items() if name in layers and name not in left}
        sampler = PlaceSampler(inputs, self.rows, self.seed)  # looks at all inputs, which may be read for that
        stores = [RowStore(sampler, shelf) for _ in range(2)]
        fits = NormFits(find_channel_norms(small, graph, maps), stores[1], self.fixed_strength, self.scarcity)
        seen: dict[str, Any] = {"drift": self.drift, "memory": memory, "graph": graph if bare else None, "left": left}
        seen["decides"] = bool(graph.ways)
        targets = record_targets(reference, common, inputs, stores[0], fits, **seen)
        merges = {name: find_output_merge(layer, graph, maps) for name, layer in targets.layers.items()}
        known = {name: layers[name] for name in targets.layers if name in layers}
        solving = _Solving(known, targets, merges, fits, self, graph)
        with evaluate_alone(small):
            solving.run(small, reached)
        if targets.parted:
            why = (
                "batches take different ways through the forward, and only layers that all of them reach are solved; "
                "give batches that each take all ways."
                if graph.ways
                else "batches reach them in different ways; give such a network all inputs as one batch."
            )
            warn_caller(f"restoring: {name_some(sorted(targets.parted))} left as before: {why}")
        if solving.unsettled:
            warn_caller(
                f"restoring: {name_some(sorted(solving.unsettled))}, which read what they gave, still got better by "
                f"{_SETTLED:.0%} or more when solving them ended, after {_ROUNDS} rounds; restoring once more may help."
            )
        return Solved(solving.changes, fits.list_written(small), solving.list_written(small), targets.skipped)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What a layer is solved on: what is known of it at its sampled places, a row for each.

    Attributes:
        inputs: what it reads (k, d), or (g, k, d) with groups; columns as in `Layer.matrix`.
        given: what its norm, or the sum that it enters, is before it is solved (k, c).
        target: what that should be (k, c).
        wanted: what its activation function should give (k, c), where that is not what it makes of the target.
        weights: how much each row counts, (k, 1) of mean 1; None for all alike.
        images: which of all images each row comes from, (k,) int64 below `RowStore.count`.
    """

    inputs: Tensor
    given: Tensor
    target: Tensor
    wanted: Tensor | None
    weights: Tensor | None
    images: Tensor

    __repr__ = show_briefly


class _Solving:
    """The passes of the smaller network, in which each layer is solved when all batches have reached it.

    For layers that run more than once there are passes up to the first call of one of them, in which all that they read
    is seen.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        targets: Targets,
        merges: Mapping[str, Tensor | None],
        fits: NormFits,
        solver: LayerSolver,
        graph: ChannelGraph,
    ) -> None:
        self.layers, self.merges = dict(layers), dict(merges)
        self.picks = {name: None if merge is None else find_picks(merge) for name, merge in merges.items()}
        self.targets, self.fits, self.solver, self.graph = targets, fits, solver, graph
        self.shelf, self.summed = targets.store.shelf, targets.summed
        self.left_out = leave_out(targets.store.count)
        self.inputs: dict[str, Tensor] = {}  # rows that a layer reads, as far as batches have come
        self.given: dict[str, Tensor] = {}  # and those that it gives
        self.changes: dict[str, Change] = {}
        self.settled: set[str] = set()
        self.unsettled: list[str] = []  # of loops that still got better when solving them ended
        self.wanted: dict[str, list[Tensor]] = {}  # of each call of layers that run more than once
        self.read: dict[str, dict[int, Tensor]] = {}  # by what the store calls a call, and by batch

    def run(self, small: nn.Module, batches: Sequence[Inputs]) -> None:
        """In the order in which layers are first reached; those that read what they gave themselves are one place."""
        self.small, self.batches, self.restart = small, batches, remember_random_numbers(small)
        loop = list[str]()
        with unfuse_attention():  # around all threads, as it holds for all
            for name in self.targets.repeated:
                read = self.watch([name])[name]
                if read and self.is_looped(name, read):
                    loop.append(name)
                    continue
                if loop:
                    self.solve_loop_(loop)
                    loop, read = [], self.watch([name])[name]
                self.settle_(name, read)
            if loop:
                self.solve_loop_(loop)
            self.watch([])
        report("restoring layers", len(self.layers), len(self.layers))

    def watch(self, names: Collection[str]) -> dict[str, list[Tensor]]:
        """A pass, in which layers are solved as far as all before them is; what these read at each of their calls.

        Of a layer that does not run as often as in the original network, nothing.
        """
        calls, count = self.targets.calls, len(self.batches)
        self.read = {key: {} for name in names for key in calls[name]}
        self.coming = iter(self.batches)  # passes begin one after another
        self.restart()
        passes = [_Pass(self, self.small, batch, count) for batch in range(count)]
        run_in_lockstep(
            [one.run for one in passes],
            self.meet,
            self.targets.order,
            around=lambda batch: passes[batch].going(),
            parted=self.part,
        )
        for key in {one.given for one in passes} | set(passes):
            if key in self.shelf.items:
                self.shelf.release(key)
        whole = [name for name in names if all(len(self.read[key]) == count for key in calls[name])]
        parts = {name: [[self.read[key][b] for b in range(count)] for key in calls[name]] for name in whole}
        self.read = {}
        return {name: [torch.cat(own, -2) for own in parts.get(name, ())] for name in names}

    def is_looped(self, name: str, read: Sequence[Tensor]) -> bool:
        """Whether what a layer reads at its calls depends on what it gave at earlier ones."""
        weight = self.layers[name].module.weight.data
        own = weight.clone()
        weight.mul_(0.5)
        try:
            changed = self.watch([name])[name]
        finally:
            weight.copy_(own)
        return len(changed) != len(read) or not all(map(torch.equal, read, changed))

    def settle_(self, name: str, read: Sequence[Tensor]) -> None:
        if read:
            self.solve_calls_(name, read)
        else:
            self.targets.skipped.setdefault(name, "it runs another number of times in the smaller network")
        self.settled.add(name)
        self.wanted.pop(name, None)

    def take_wanted(self, name: str) -> list[Tensor]:
        """What a layer gave at each of its calls in the original network."""
        if name not in self.wanted:
            self.wanted[name] = [self.targets.store.take(key) for key in self.targets.calls[name]]
        return self.wanted[name]

    def solve_calls_(self, name: str, read: Sequence[Tensor]) -> bool:
        """Solve a layer for its first calls, at which it reads this."""
        layer, inputs, store = self.layers[name], torch.cat(list(read), -2), self.targets.store
        calls = self.targets.calls[name][: len(read)]
        aims, images = self.aim(name, torch.cat(self.take_wanted(name)[: len(read)])), [store.images[k] for k in calls]
        given = layer.apply_norm(layer.compute(inputs))
        return self.solve_layer_(layer, LayerRows(inputs, given, *aims, store.weigh(calls), torch.cat(images)))

    def solve_loop_(self, names: Sequence[str]) -> None:
        """Solve layers that read what they gave, one after another, for all their calls, as long as that helps.

        Where it does not from the beginning, what they read is far from what it is to be: then for their first call,
        for the first 2, 4, ... and all. The weights with the least error at all calls stay, be it those of before.
        """
        calls = max(len(self.targets.calls[name]) for name in names)
        loop, rounds = _LoopState(self, names), [(name, calls) for _ in range(_ROUNDS) for name in names]
        if not self.go_round_(loop, rounds, patience=len(names)):
            self.unsettled += names
        if not loop.is_better:
            loop.put_back_()
            self.go_round_(loop, [(name, upto) for upto in _double_up_to(calls) for name in names])
        loop.put_back_()
        for name in names:
            self.settled.add(name)
            self.wanted.pop(name, None)

    def go_round_(self, loop: _LoopState, steps: Sequence[tuple[str, int]], patience: int | None = None) -> bool:
        """Solve a layer of a loop for so many of its calls at each step; whether the error does not fall any longer.

        Args:
            patience: steps that need not lead further before that is so; None for all.
        """
        stuck = 0
        for name, upto in (*steps, ("", 0)):
            found = self.watch(loop.names)
            error = sum(self.measure(n, read) for n, read in found.items())
            stuck = 0 if error < (1 - _SETTLED) * loop.least else stuck + 1
            loop.note(error)
            if not math.isfinite(error) and math.isfinite(loop.least):  # it grew without bounds
                return True
            if patience is not None and stuck > patience:
                return True
            if name and found[name]:
                self.solve_calls_(name, found[name][:upto])
        return patience is None or not steps or stuck >= len(loop.names)

    def measure(self, name: str, read: Sequence[Tensor]) -> float:
        """The squared error of what a layer gives at all its calls, as a fraction of the square of what it should.

        Behind the activation function, where only that reads the layer. Infinite where it does not run as often.
        """
        if not read:
            return math.inf
        layer, weights = self.layers[name], self.targets.store.weigh(self.targets.calls[name])
        activation = self.targets.activations.get(name, lambda rows: rows)
        target = self.merge(name, activation(torch.cat(self.take_wanted(name))))
        given = activation(layer.apply_norm(layer.compute(torch.cat(list(read), -2))))
        error, size = (target - given).square(), target.square()
        error, size = (t if weights is None else t * weights.to(t) for t in (error, size))
        return float(error.sum(dtype=torch.float64) / size.sum(dtype=torch.float64).clamp(min=1e-300))

    def meet(self, key: tuple[str, str], brought: Sequence[Any]) -> Sequence[Any]:
        """All batches stand at a layer with what it gives, or at a norm."""
        kind, name = key
        if kind != "layer":
            return self.fits.meet(key, brought)
        store = self.targets.store
        aims = self.aim(name, store.take(name))
        inputs, given = self.inputs.pop(name), self.given.pop(name)
        rows = LayerRows(inputs, given, *aims, store.weights[name], store.images[name])
        is_written = self.solve_layer_(self.layers[name], rows)
        self.settled.add(name)
        return [is_written] * len(brought)

    def aim(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a layer should give and, where that is something else than its activation function makes of it, what
        that should give behind it, (k, c), by what it gave (k, n).
        """
        activation, parts = self.find_activation(name), rows.split(ROWS)
        target = join_rows((self.merge(name, part) for part in parts), len(rows))
        if activation is None or self.merges[name] is None or self.picks[name] is not None:
            return target, None
        return target, join_rows((self.merge(name, activation(part)) for part in parts), len(rows))

    def find_activation(self, name: str) -> Activation | None:
        """What alone reads a layer's output, where there are steps towards what it gives."""
        return self.targets.activations.get(name) if self.solver.steps else None

    def part(self, key: tuple[str, str]) -> None:
        """Some batches stand at a layer, others at another one or at the end."""
        kind, name = key
        self.inputs.pop(name, None)
        self.given.pop(name, None)
        if kind == "layer":
            self.settled.add(name)
            self.targets.parted.add(name)
            self.targets.skipped.setdefault(name, "batches reach it in different ways in the smaller network")

    def knows(self, layer: BareLayer, model: nn.Module) -> bool:
        """Whether what a function computes is to be solved; the first batch tells what it is in the smaller network."""
        name, original = layer.name, self.targets.layers.get(layer.name)
        if not isinstance(original, BareLayer) or name in self.targets.skipped:
            return False
        if name not in self.layers:
            merge = layer.cut_merge(self.merges[name], original)
            if merge is None:
                self.targets.skipped[name] = "in the smaller network it gives what came from another product as well"
                return False
            sizes = {bias: shape[0] for bias, shape in self.graph.shapes.items() if len(shape) == 1}
            found = layer.like(original, named_tensors(model), sizes)
            if found is None:
                self.targets.skipped[name] = "in the smaller network its bias is another part of what it is a part of"
                return False
            self.layers[name] = found
            self.merges[name], self.picks[name] = merge, None if merge is None else find_picks(merge)
        known = self.layers[name]
        return isinstance(known, BareLayer) and (known.start, known.outputs) == (layer.start, layer.outputs)

    def list_written(self, small: nn.Module) -> dict[str, Tensor]:
        """Tensors of the network that were written, by name."""
        written = {t.untyped_storage()._cdata for name in self.changes for t in self.layers[name].writable}
        return {n: t for n, t in named_tensors(small).items() if t.untyped_storage()._cdata in written}

    def bring(self, name: str, batch: int, inputs: Tensor, given: Tensor) -> None:
        """What a layer reads and gives into one matrix each for all batches, so that they are not there twice."""
        places = self.targets.store.places[name]
        if len(places) == 1:
            self.inputs[name], self.given[name] = inputs, given
            return
        counts = [len(own) for own in places]
        start = sum(counts[:batch])
        for known, rows in ((self.inputs, inputs), (self.given, given)):
            if name not in known:
                known[name] = rows.new_empty(*rows.shape[:-2], sum(counts), rows.shape[-1])
            known[name][..., start : start + counts[batch], :] = rows

    def solve_layer_(self, layer: Layer, rows: LayerRows) -> bool:
        """Solve one layer on these rows and write it; False if it is right already."""
        report("restoring layers", len(self.settled), len(self.layers))
        if _is_right(rows.given, rows.target):
            return False
        activation = self.find_activation(layer.name)
        change = self.find_change(Task(layer, rows.given, rows.target, activation, rows.wanted, rows.weights), rows)
        if change is None:
            return False
        if not all(bool(torch.isfinite(t).all()) for t in change):
            where = self.blame(layer.name, rows)
            raise ModelError(
                f"{layer.name}: restoring gives NaN or infinity, as the smaller network does on {where}; "
                f"check the scale of the images, and the sizes asked for."
            )
        layer.add_(*change)
        before = self.changes.get(layer.name)
        self.changes[layer.name] = change if before is None else (before[0] + change[0], before[1] + change[1])
        return True

    def find_change(self, task: Task, rows: LayerRows) -> Change | None:
        """What rows call for; None where a layer is better left as it is.

        Of the steps for an activation function, the last is taken on all rows, from what the others on a part led to.
        """
        solver, apart = self.solver, self.left_out.to(rows.images.device)[rows.images]
        ridge, start = task.ridge(rows.inputs, solver.fixed_strength, solver.scarcity), None
        steps = 0 if task.activation is None else solver.steps
        if solver.strength is None and bool(apart.any()) and not bool(apart.all()):
            found = choose_strength(task, ridge, apart, rows.images, max(0, steps - 1))
            if found is None:
                return None
            strength, start = found
            ridge, steps = ridge.with_strength(strength), min(1, steps)
        return ridge.solve(task.lacking, steps, start)

    def blame(self, name: str, rows: LayerRows) -> str:
        """Where the first row comes from that is not finite."""
        inputs = rows.inputs.movedim(-2, 0).flatten(1)  # of all groups
        finite = torch.isfinite(inputs).all(1) & torch.isfinite(rows.given).all(1)
        if bool(finite.all()):
            return "these images"
        counts, places = self.targets.store.sampler.counts, self.targets.store.places
        ends = list(itertools.accumulate(len(own) for key in self.targets.calls[name] for own in places[key]))
        return name_batch(counts, bisect.bisect(ends, int(finite.int().argmin())) % len(counts))

    def merge(self, name: str, rows: Tensor) -> Tensor:
        merge, picks = self.merges[name], self.picks[name]
        if picks is not None:
            return rows.index_select(1, picks.to(rows.device))
        return rows if merge is None else rows @ merge.T.to(rows)


def _is_right(given: Tensor, target: Tensor) -> bool:
    """Whether rows are off by next to nothing."""
    off = [float((b - a).norm()) for a, b in zip(given.split(ROWS), target.split(ROWS), strict=True)]
    return math.hypot(*off) <= _RIGHT * float(target.norm())


def _double_up_to(count: int) -> list[int]:
    """
    >>> _double_up_to(7), _double_up_to(4)
    ([1, 2, 4, 7], [1, 2, 4])
    """
    return [*(2**i for i in range(count.bit_length()) if 2**i < count), count]


class _LoopState:
    """The weights of the layers of a loop with which their error was the least so far."""

    def __init__(self, solving: _Solving, names: Sequence[str]) -> None:
        self.solving, self.names = solving, names
        self.writable = [t for name in names for t in solving.layers[name].writable]
        self.least, self.noted = math.inf, 0
        self.keep()

    def keep(self) -> None:
        self.best, self.changes = [t.detach().clone() for t in self.writable], dict(self.solving.changes)

    def note(self, error: float) -> None:
        """The error of the weights as they are."""
        if error < self.least:
            self.least, self.noted = error, self.noted + 1
            self.keep()

    @property
    def is_better(self) -> bool:
        """Whether any weights were better than those of before."""
        return self.noted > 1

    def put_back_(self) -> None:
        self.solving.changes = dict(self.changes)
        for tensor, value in zip(self.writable, self.best, strict=True):
            tensor.data.copy_(value)


class _Pass:
    """The smaller network on one batch; all batches share its weights, and else have copies of their own.

    A layer that enters a sum is solved when the sum is computed: by then the other branch is known.
    """

    def __init__(self, solving: _Solving, small: nn.Module, batch: int, count: int) -> None:
        self.solving, self.small, self.batch, self.count = solving, small, batch, count
        self.layers, self.shelf, self.store = solving.layers, solving.shelf, solving.targets.store
        self.live = LiveTensors(self.before)
        self.uses = UseWatcher(self.layers, before_sum=self.entered)
        self.waiting: dict[str, tuple[Tensor, Arrange]] = {}
        self.turns: Counter[str] = Counter()
        self.open = False  # behind a layer that is not solved yet
        self.random = remember_random_numbers(small)
        self.given: frozenset[int] = frozenset()  # storages of what the network is called on
        self.steps = 0

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Around each stretch to the next layer: what the batch holds is there, and its random numbers go on."""
        with returning_large_pages():
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
        if self.count > 1 or self.solving.targets.repeated:  # each pass begins with what is kept as it was
            model = copy_model(model, share=named_tensors(model).keys() - self.solving.targets.written)
            live = self.live if self.count > 1 else live
        modules = {name: module for name, module in model.named_modules() if name in self.layers}
        fitting = self.solving.fits.fitting(model, self.batch, turn, self.live.note, lambda: self.open)
        bare = contextlib.nullcontext()
        if any(isinstance(layer, BareLayer) for layer in self.solving.targets.layers.values()):
            ran, along = self.solving.targets.ran, self.solving.targets.along
            bare = BareWatcher(model, self.solving.graph, ran, self.reached_bare, self.called_bare, along)
            bare.begin()
        with live, fitting, watch_calls(modules, self.called, reached=self.reached), self.uses, bare:
            given = prepare(next(self.solving.coming), model).copied()
            self.model, self.images = model, count_images(given)
            self.given = frozenset(t.untyped_storage()._cdata for t in given.tensors() if is_plain(t))
            with told_of(model, given), self.solving.targets.decide(self.batch):
                read_iterators(model(*given.args, **(given.kwargs or {})))

    def before(self, given: Sequence[Tensor]) -> None:
        """What an operation reads may lie on the shelf with another batch, where modules keep what they computed."""
        self.turn.check()
        if self.shelf.emptied:
            self.shelf.ensure([t.untyped_storage() for t in given if is_plain(t)])

    def reached_bare(self, layer: BareLayer, x: Tensor) -> None:
        arrange: Arrange = lambda rows: layer.arrange(rows, self.images)  # noqa: E731
        if self.solving.knows(layer, self.model):
            places = self.store.places[layer.name][self.batch]
            if layer.spatial_dims or places.shape[1] == arrange(x).dim() - 1:
                self.reached(layer.name, x, arrange)

    def reached(self, name: str, x: Tensor, arrange: Arrange = lambda rows: rows) -> None:
        layer, calls = self.layers[name], self.solving.targets.calls[name]
        own = calls[self.turns[name] : self.turns[name] + 1]
        self.note_read(layer, own, x)
        self.turns[name] += 1
        if name in self.solving.settled or not self.has_rows(name, (own or [name])[0], arrange(x)):
            return
        self.open = self.open or len(calls) > 1
        if self.open:
            return
        if name in self.solving.summed:
            self.waiting[name] = x, arrange
        else:
            self.bring(layer, arrange(x))
            self.wait(layer)

    def note_read(self, layer: Layer, calls: Sequence[str], x: Tensor) -> None:
        """What a layer reads at a call, if that is watched."""
        for key in calls:
            if key in self.solving.read and self.has_rows(layer.name, key, x):
                self.solving.read[key][self.batch] = layer.take_inputs(x, self.store.places[key][self.batch])

    def has_rows(self, name: str, key: str, x: Tensor) -> bool:
        """Whether as many rows are read as in the original network; the layer is left as it is otherwise."""
        if self.layers[name].shape_places(x) == self.solving.targets.lengths.get((key, self.batch)):
            return True
        self.solving.targets.skipped[name] = (
            "other rows reach it in the smaller network: channels that are fewer lie along them, or its forward goes "
            "by values that are not answered alike"
        )
        self.solving.settled.add(name)
        return False

    def called_bare(self, layer: BareLayer, x: Tensor, output: Tensor) -> None:
        self.called(layer.name, x, output)

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.waiting:
            self.uses.watch(output, name, moves=isinstance(self.layers[name], BareLayer))

    def entered(self, found: Unread, a: Tensor, b: Tensor) -> None:
        with unseen_by_modes():  # rows that are brought are no part of what the batch holds
            for output, name in found:
                if name in self.waiting and not self.open:
                    layer, (x, arrange) = self.layers[name], self.waiting.pop(name)
                    one, other = (arrange(self.uses.take_back(output, t)) for t in (a, b))
                    self.bring(layer, arrange(x), (one, other))
                    if self.wait(layer):
                        with torch.inference_mode(output.is_inference()), torch.no_grad():
                            new = layer.apply_norm(layer.module.forward(x.to(layer.module.weight.dtype)))  # autocast
                            output.copy_(self.uses.take_along(output, new))

    def bring(self, layer: Layer, x: Tensor, summands: Sequence[Tensor] = ()) -> None:
        """Rows of what a layer reads and gives, or of the sum that it enters; nothing of them stays here."""
        places = self.store.places[layer.name][self.batch]
        inputs, rows = layer.take_inputs(x, places), [layer.take_outputs(t, places) for t in summands]
        given = torch.add(*rows) if rows else layer.apply_norm(layer.compute(inputs))
        self.solving.bring(layer.name, self.batch, inputs, given)

    def wait(self, layer: Layer) -> bool:
        """Until the layer is solved on all batches; whether it was written."""
        return bool(self.turn.wait(("layer", layer.name), None))
