"""What layers are solved for: what they gave in the original network, over all batches."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.network.batches import cast_like, channels_last, count_images, double_first
from intrafusion.network.free_pages import return_free_pages
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, watch_calls
from intrafusion.network.state import evaluate_alone, preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.restore.activation import Activation
from intrafusion.restore.live import LiveTensors
from intrafusion.restore.norm_fits import NormFits
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.too_large import TooLarge, check_size, is_out_of_memory
from intrafusion.restore.uses import Unread, UseWatcher

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
    """

    store: RowStore
    summed: set[str] = field(default_factory=set)
    activations: dict[str, Activation] = field(default_factory=dict)
    order: list[Hashable] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    parted: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    needs: list[int] = field(default_factory=list)

    __repr__ = show_briefly

    @property
    def names(self) -> list[str]:
        return list(self.store.rows)


def record_targets(
    reference: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Inputs],
    store: RowStore,
    fits: NormFits | None = None,
    *,
    drift: bool = True,
    memory: int | None = None,
) -> Targets:
    """One forward pass of the original network on each batch; it is left as it was.

    What a whole pass tells is taken from the first batch: which layers run once and are what they look like, what reads
    them. Layers that later batches do not reach in the same way are skipped.

    Args:
        fits: norms for which what they give is stored too.
        drift: whether sums are wanted in place of the summands.
        memory: bytes that a batch may hold between two layers; None for any.
    Raises:
        ModelError: the network gives NaN on a batch, which is named.
        TooLarge: a batch does not fit into memory, or the device has no room for it.
    """
    recording = _Recording(layers, store, fits, drift)
    with preserve_state(reference) as put_back:
        for batch, call in enumerate(batches):
            with evaluate_alone(reference):
                recording.run_or_tell(reference, batch, call)
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
    ) -> None:
        self.layers, self.store, self.fits, self.drift = layers, store, fits, drift
        self.targets = Targets(store)
        self.plain: dict[str, bool] = {}
        self.parted: dict[str, int] = {}  # the first batch that reaches a layer in another way
        self.events: list[dict[str, str]] = []  # of each batch: what happened to each layer

    def run_or_tell(self, reference: nn.Module, batch: int, call: Inputs) -> None:
        try:
            self.run(reference, batch, call)
        except ModelError as error:
            if not is_out_of_memory(error):
                raise
            raise TooLarge(call, count_images(call) // 2, error) from error

    def run(self, reference: nn.Module, batch: int, call: Inputs) -> None:
        self.batch, self.call = batch, prepare(call, reference)
        self.events.append({})
        self.targets.needs.append(0)
        self.live = LiveTensors(lambda _: None)
        self.uses = UseWatcher(self.layers, after_sum=self.entered if self.drift else None)
        versions = _list_versions(reference)
        fitting = contextlib.nullcontext()
        if self.fits is not None:
            fitting = self.fits.recording(reference, batch, self.call, self.targets.order)
        modules = {name: layer.module for name, layer in self.layers.items()}
        with fitting, self.live, watch_calls(modules, self.called), self.uses:
            outputs = self.call.call(reference)
        if batch == 0:
            self.uses.mark_read(outputs)
            self.targets.activations = self.uses.activations
        after = _list_versions(reference)
        self.targets.written |= {name for name, version in versions.items() if after.get(name) != version}

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        self.targets.needs[-1] = max(self.targets.needs[-1], self.live.count_bytes())
        events, layer = self.events[-1], self.layers[name]
        if name in events:
            self.skip(name, "it runs more than once")
            return
        events[name] = "called"
        if name not in self.targets.skipped:
            self.look_at(layer, x, output)
        if self.plain[name]:
            self.uses.watch(output, name)

    def look_at(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        name, counts = layer.name, layer.weigh_rows(output, self.call.weights)
        rows = output if output.dim() < 2 else output.movedim(layer.channel_dim, -1)
        limit = layer.limit_rows(self.store.sampler.limit)
        places = self.store.sample(name, self.batch, rows, counts, count_images(self.call), limit)
        if places is None:
            self.part(name, self.batch)
            return
        self.put(name, layer.apply_norm(layer.take_outputs(output, places)))
        if self.batch == 0:
            tried = places if len(places) else layer.sample_places(output, _FEW, 0, counts)
            self.plain[name] = layer.is_plain(x, output, tried)
        if not self.plain[name]:
            self.skip(name, "it does more than multiply by its weight")

    def entered(self, found: Unread, total: Tensor) -> str:
        """Of two layers that enter the sum, the one with the larger filters makes up for the other."""
        name = max((name for _, name in found), key=lambda n: self.layers[n].fan_in)
        self.events[-1][name] = "summed"
        self.targets.summed.add(name)
        if name not in self.targets.skipped:
            self.put(name, self.layers[name].take_outputs(total, self.store.places[name][self.batch]))
        return name

    def put(self, name: str, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows).all()):
            where = name_batch(self.store.sampler.counts, self.batch)
            raise ModelError(f"{name}: the original network gives NaN or infinity on {where}; check their scale.")
        self.store.put(name, self.batch, rows)
        if self.batch == 0:
            self.targets.order.append(("layer", name))

    def skip(self, name: str, why: str) -> None:
        self.targets.skipped.setdefault(name, why)
        self.store.forget(name)

    def part(self, name: str, batch: int) -> None:
        first = self.parted[name] = min(batch, self.parted.get(name, batch))
        self.skip(name, "")
        self.targets.skipped[name] = (
            f"{name_batch(self.store.sampler.counts, first)} reaches it in another way than the first"
        )
        self.targets.parted.add(name)

    def finish(self) -> Targets:
        first = self.events[0]
        for batch, events in enumerate(self.events):
            for name in first.keys() | events.keys():
                if first.get(name) != events.get(name):
                    self.part(name, batch)
        targets = self.targets
        targets.summed &= self.store.rows.keys()
        targets.order = list(dict.fromkeys(reversed(targets.order)))[::-1]
        for store in (self.store, *([] if self.fits is None else [self.fits.store])):
            store.finish()
        return targets


def _list_versions(model: nn.Module) -> dict[str, int]:
    """Of its tensors; those made in inference mode, which cannot be written elsewhere, have none."""
    return {name: t._version for name, t in named_tensors(model).items() if not t.is_inference()}
