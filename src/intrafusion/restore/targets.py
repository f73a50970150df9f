"""What layers are solved for: what they gave in the original network, over all batches."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import cast_like, channels_last, count_images, double_first
from intrafusion.network.decisions import Decisions
from intrafusion.network.free_pages import return_free_pages
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, has_own_forward, watch_calls
from intrafusion.network.state import evaluate_alone, preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.observe.bare import BareLayer, BareWatcher
from intrafusion.observe.image_dims import find_image_dims
from intrafusion.restore.activation import Activation
from intrafusion.restore.live import LiveTensors
from intrafusion.restore.norm_fits import NormFits
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.too_large import TooLarge, check_size, is_out_of_memory
from intrafusion.restore.uses import Unread, UseWatcher
from intrafusion.trace.decomposition import unfuse_attention

_FEW = 16  # places by which a layer is tried


def prepare(call: Inputs, model: nn.Module) -> Inputs:
    """A batch as a network is called on it: in its precision, on its device, and so that the order of rows is seen."""
    return cast_like(double_first(call.map(channels_last)), model)


def name_batch(counts: Sequence[int], batch: int) -> str:
    """
    Args:
        counts: images in each batch.
    """
    if len(counts) == 1:
        return "these images"
    start = sum(counts[:batch])
    return f"batch {batch} (images {start} to {start + counts[batch] - 1})"


@dataclass(eq=False)
class Targets:
    """What the original network gave.

    Attributes:
        store: of each layer the sampled places (see `Layer.sample_places`), and what its norm gave there; what the sum
            was for layers in `summed`.
        activations: the function that alone reads that, where there is one.
        order: layers and norms as they were reached.
        skipped: layers that are not solved, and why.
        parted: those of them that another batch reaches in another way.
        written: tensors that a forward pass writes, by name.
        needs: bytes that a pass held at most between two layers, by batch.
        layers: those of the original network that there are rows of.
        calls: of each of them, the names in the store of what it gave at its calls.
        ran: modules whose weights are theirs alone.
        lengths: the shape of the rows that a call read on a batch, by the call's name in the store and the batch.
        along: of the rows of products with parameters, the dimension of images, see `find_image_dims`.
        decisions: of each batch what its forward decided by values, to be decided alike in the smaller network.
    """

    store: RowStore
    summed: set[str] = field(default_factory=set)
    activations: dict[str, Activation] = field(default_factory=dict)
    order: list[Hashable] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    parted: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    needs: list[int] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    calls: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    along: dict[str, int] = field(default_factory=dict)
    decisions: list[Decisions] = field(default_factory=list)

    __repr__ = show_briefly

    def decide(self, batch: int) -> contextlib.AbstractContextManager[object]:
        """Around a pass of another network on a batch, which then goes the way that the original one went."""
        if not self.decisions:
            return contextlib.nullcontext()
        return Decisions(self.decisions[batch].record, ordered=True).played()

    @property
    def repeated(self) -> list[str]:
        """Layers that run more than once, in the order of their first calls."""
        return [name for name, calls in self.calls.items() if len(calls) > 1]


def record_targets(
    reference: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Inputs],
    store: RowStore,
    fits: NormFits | None = None,
    *,
    drift: bool = True,
    memory: int | None = None,
    graph: ChannelGraph | None = None,
    left: Collection[str] = (),
    decides: bool = False,
) -> Targets:
    """One forward pass of the original network on each batch; it is left as it was.

    What a whole pass tells is taken from the first batch: how often layers run and which are what they look like, what
    reads them. Of layers that run more than once each call is stored by itself, and not the sums that it enters. Layers
    that later batches do not reach in the same way are skipped.

    Args:
        fits: norms for which what they give is stored too.
        drift: whether sums are wanted in place of the summands.
        memory: bytes that a batch may hold between two layers; None for any.
        graph: that of the network, if weights are to be seen that functions multiply with.
        left: modules whose weights are not.
        decides: whether the forward goes by the values of its tensors.
    Raises:
        ModelError: the network gives NaN on a batch, which is named.
        TooLarge: a batch does not fit into memory, or the device has no room for it.
    """
    recording = _Recording(layers, store, fits, drift, decides=decides)
    if graph is not None:
        recording.watch_bare(reference, graph, left, batches)
    with preserve_state(reference) as put_back, unfuse_attention():
        for batch, call in enumerate(batches):
            with evaluate_alone(reference):
                recording.run_or_tell(reference, batch, call)
            recording.again = recording.again and not put_back.rebound
            put_back()
            check_size(call, recording.targets.needs[batch], memory)
            return_free_pages()
    return recording.finish()


class _Recording:
    """The passes of the original network, one batch after another."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        store: RowStore,
        fits: NormFits | None,
        drift: bool,
        *,
        decides: bool = False,
    ) -> None:
        self.layers, self.store, self.fits, self.drift, self.decides = dict(layers), store, fits, drift, decides
        self.targets = Targets(store)
        self.bare: BareWatcher | None = None
        self.left: Collection[str] = ()
        self.plain: dict[str, bool] = {}
        self.calls: dict[str, list[str]] = {}
        self.again = True  # whether another pass of the network sees the same
        self.parted: dict[str, int] = {}  # the first batch that reaches a layer in another way
        self.events: list[dict[str, str]] = []  # of each batch: what happened to each layer

    def watch_bare(
        self, reference: nn.Module, graph: ChannelGraph, left: Collection[str], batches: Sequence[Inputs]
    ) -> None:
        owned = {layer.weight_name for layer in self.layers.values()}
        along = self.targets.along = find_image_dims(reference, graph, batches[0], owned)
        self.bare = BareWatcher(reference, graph, self.targets.ran, called=self.called_bare, along=along)
        self.left = left

    def run_or_tell(self, reference: nn.Module, batch: int, call: Inputs) -> None:
        try:
            self.run(reference, batch, call)
        except ModelError as error:
            if not is_out_of_memory(error):
                raise
            raise TooLarge(call, count_images(call) // 2, error) from error

    def run(self, reference: nn.Module, batch: int, call: Inputs) -> None:
        self.batch, self.call = batch, prepare(call, reference)
        self.images = count_images(self.call)
        self.events.append({})
        self.turns: Counter[str] = Counter()
        self.arranged: dict[str, Callable[[Tensor], Tensor]] = {}
        self.targets.ran.clear()
        self.targets.ran.update(self.left)
        self.targets.needs.append(0)
        self.live = LiveTensors(lambda _: None)
        self.uses = UseWatcher(self.layers, after_sum=self.entered if self.drift else None)
        versions = _list_versions(reference)
        fitting = contextlib.nullcontext()
        if self.fits is not None:
            fitting = self.fits.recording(reference, batch, self.call, self.targets.order)
        modules = {name: layer.module for name, layer in self.layers.items() if not isinstance(layer, BareLayer)}
        bare = contextlib.nullcontext() if self.bare is None else self.bare
        if self.bare is not None:
            self.bare.begin()
        with (
            fitting, self.live, watch_calls(modules, self.called, reached=self.reached), self.uses, bare,
            self.deciding(),
        ):  # fmt: skip
            outputs = self.call.call(reference)
        if batch == 0:
            self.uses.mark_read(outputs)
            self.finish_first()
        after = _list_versions(reference)
        self.targets.written |= {name for name, version in versions.items() if after.get(name) != version}

    def deciding(self) -> contextlib.AbstractContextManager[object]:
        if not self.decides:
            return contextlib.nullcontext()
        self.targets.decisions.append(Decisions(ordered=True))
        return self.targets.decisions[-1].played()

    def reached(self, name: str, x: Tensor) -> None:
        if not has_own_forward(self.layers[name].module):
            self.targets.ran.add(name)

    def called_bare(self, layer: BareLayer, x: Tensor, output: Tensor) -> None:
        self.layers.setdefault(layer.name, layer)
        if layer.hides_images(self.images):
            self.skip(layer.name, f"which of its rows are of which of {self.images} images is not seen; give others")
        self.called(layer.name, x, output, lambda rows: layer.arrange(rows, self.images))

    def called(
        self, name: str, x: Tensor, output: Tensor, arrange: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> None:
        self.targets.needs[-1] = max(self.targets.needs[-1], self.live.count_bytes())
        layer, key = self.layers[name], self.count_call(name)
        self.arranged[name] = arrange
        if name not in self.targets.skipped:
            self.look_at(layer, key, arrange(x), arrange(output))
        if self.plain.get(key):
            self.uses.watch(output, name, moves=isinstance(layer, BareLayer))

    def count_call(self, name: str) -> str:
        """What the store calls this one."""
        self.turns[name] += 1
        key = name if self.turns[name] == 1 else f"{name}@{self.turns[name]}"
        self.events[-1][key] = name
        calls = self.calls.setdefault(name, [])
        if key not in calls:
            calls.append(key)
        if len(calls) > 1 and isinstance(self.layers[name], BareLayer):
            self.skip(name, "it runs more than once")
        return key

    def look_at(self, layer: Layer, key: str, x: Tensor, output: Tensor) -> None:
        name, counts = layer.name, layer.weigh_rows(output, self.call.weights)
        rows = output if output.dim() < 2 else output.movedim(layer.channel_dim, -1)
        limit = layer.limit_rows(self.store.sampler.limit)
        self.targets.lengths[key, self.batch] = layer.shape_places(x)
        places = self.store.sample(key, self.batch, rows, counts, self.images, limit)
        if places is None:
            self.part(name, self.batch)
            return
        self.put(name, key, layer.apply_norm(layer.take_outputs(output, places)))
        if self.batch == 0:
            tried = places if len(places) else layer.sample_places(output, _FEW, 0, counts)
            self.plain[key] = layer.is_plain(x, output, tried)
        if not self.plain[key]:
            self.skip(name, "it does more than multiply by its weight")

    def entered(self, found: Unread, total: Tensor) -> str:
        """Of two layers that enter the sum, the one with the larger filters makes up for the other."""
        name = max((name for _, name in found), key=lambda n: self.layers[n].fan_in)
        self.events[-1][_name_sum(name)] = name
        self.targets.summed |= set() if self.batch else {name}
        if name not in self.targets.skipped and len(self.calls[name]) == 1:
            output = next(t for t, own in found if own == name)
            rows = self.arranged[name](self.uses.take_back(output, total))
            rows = self.layers[name].take_outputs(rows, self.store.places[name][self.batch])
            self.put(name, name if self.batch else _name_sum(name), rows)
        return name

    def put(self, name: str, key: str, rows: Tensor) -> None:
        if not (bool(rows.sum().isfinite()) or bool(rows.isfinite().all())):  # the sum is quick, and may overflow
            where = name_batch(self.store.sampler.counts, self.batch)
            raise ModelError(f"{name}: the original network gives NaN or infinity on {where}; check their scale.")
        self.store.put(key, self.batch, rows)
        if self.batch == 0:
            self.targets.order.append(("layer", name))

    def skip(self, name: str, why: str) -> None:
        self.targets.skipped.setdefault(name, why)
        for key in (*self.calls.get(name, ()), _name_sum(name)):
            self.store.forget(key)

    def part(self, name: str, batch: int) -> None:
        first = self.parted[name] = min(batch, self.parted.get(name, batch))
        self.skip(name, "")
        self.targets.skipped[name] = (
            f"{name_batch(self.store.sampler.counts, first)} reaches it in another way than the first"
        )
        self.targets.parted.add(name)

    def finish_first(self) -> None:
        """After the first batch, it is known how often each layer runs."""
        reads, calls = self.uses.reads, self.calls
        again = {name for name, own in calls.items() if len(own) > 1}
        behind = {n: f for n, f in self.uses.activations.items() if reads[n] == len(calls[n])}
        self.targets.activations = {n: f for n, f in behind.items() if n not in again & self.targets.summed}
        self.targets.summed -= again
        for name in [name for name in calls if _name_sum(name) in self.store.rows]:
            if len(calls[name]) == 1:
                self.store.adopt(name, _name_sum(name))
            else:
                self.store.forget(_name_sum(name))

    def finish(self) -> Targets:
        first = self.events[0]
        for batch, events in enumerate(self.events):
            for event in first.keys() ^ events.keys():
                self.part({**first, **events}[event], batch)
        targets = self.targets
        for name in self.calls if not self.again else ():
            if len(self.calls[name]) > 1:
                self.skip(name, "it runs more than once, in a network that keeps a state between calls")
        if self.bare is not None:
            self.settle(self.bare)
        targets.calls = {name: own for name, own in self.calls.items() if name in self.store.rows}
        targets.layers = {name: self.layers[name] for name in targets.calls}
        targets.summed &= targets.layers.keys()
        targets.order = list(dict.fromkeys(reversed(targets.order)))[::-1]
        self.store.finish([targets.calls[name] for name in targets.repeated])
        if self.fits is not None:
            self.fits.store.finish()
        return targets

    def settle(self, bare: BareWatcher) -> None:
        """Of weights that functions multiply with, those remain that nothing else reads."""
        for name, bias in bare.settle(self.layers).items():
            self.store.add(name, bias)
        for name in bare.list_shared(self.layers, self.store.rows):
            self.skip(name, "something else reads its weight or its bias as well")
        for name in self.store.rows & self.layers.keys():
            if isinstance(layer := self.layers[name], BareLayer):
                self.targets.skipped.pop(layer.tensor.rpartition(".")[0], None)  # its forward is not its class's


def _name_sum(name: str) -> str:
    """Of the sum that a layer enters, in the store."""
    return f"sum of {name}"


def _list_versions(model: nn.Module) -> dict[str, int]:
    """Of its tensors; those made in inference mode, which cannot be written elsewhere, have none."""
    return {name: t._version for name, t in named_tensors(model).items() if not t.is_inference()}
