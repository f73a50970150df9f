"""What a network does with the channels of its groups: on images, or as its tensors are before anything is folded.

One batch is held at a time; what is kept per group does not grow with the number of images. The network is left as it
was found: modes, buffers, `requires_grad`, `.grad` and random numbers included.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.arguments import Seed, checked
from intrafusion.errors import ArgumentError, ModelError, unknown_name
from intrafusion.graph import ChannelGraph, ChannelGroup, Role
from intrafusion.importance.observation import NEEDS, Activations, Observation, check_images, importance_label, needs_of
from intrafusion.measure.accuracy import class_scores
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike, cast_like, count_images, double_first, read_labelled
from intrafusion.network.inputs import Inputs, output_tensors
from intrafusion.network.layers import Layer, Port, is_linear_map, watch_calls
from intrafusion.network.row_weights import RowWeights, select_counted, weigh_within
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import check_graph, named_tensors
from intrafusion.network.wrappers import outside_inference

MAPS = 16  # images of which feature maps are kept
PLACES = 1024  # places of a feature map that are kept; of larger ones, a sample


@checked
@outside_inference
def observe(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Iterable[ChannelGroup],
    images: ImagesLike | None,
    needs: Collection[str],
    *,
    seed: Seed = 0,
) -> dict[str, Observation]:
    """Watch these groups of a network.

    The loss whose gradients are taken is, per batch: the network's own `loss` if its output has one that takes
    gradients; with labels, the cross-entropy of class scores to class numbers, or the mean squared error to values of
    the outputs' shape; without labels, half the mean squared output. Batches are weighed by their number of images.
    Padded tokens, as an attention mask tells them, count nowhere.

    Args:
        graph: of this network; `groups` are some of its groups.
        images: one batch, or any iterable of batches with or without labels, such as a DataLoader; see `batches`.
            Not needed for `tensors` alone.
        needs: names of what to observe: "tensors", "gradients", "activations", "feature_maps", "contributions".
        seed: for the sampling of places, and for networks that draw random numbers.
    Returns:
        by group name; empty if nothing is needed.
    Raises:
        ArgumentError: an unknown need.
        ObservationError: something that takes images is needed and there are none.
        ModelError: the network does not run on the images, gives NaN, or has a loss without gradients.
    """
    for need in needs:
        if not isinstance(need, str) or need not in NEEDS:
            raise ArgumentError(unknown_name("observation", need, NEEDS))
    check_graph(graph, model)
    model = borrow(model)
    wanted, groups = frozenset(needs), list(groups)
    check_images("observe", wanted, images)
    if not wanted:
        return {}
    views = {g.name: _View(g, _find_ports(model, g), wanted, seed) for g in groups}
    gradients = _Gradients(model, groups if "gradients" in wanted else [])
    count = 0
    if images is not None and wanted - {"tensors"}:
        with preserve_state(model), _watch(views.values(), gradients):
            torch.manual_seed(seed)
            for call, labels in read_labelled(images):
                count += count_images(call)
                call = call if gradients.parameters else double_first(call)
                for view in views.values():
                    view.weights = call.weights
                _run(cast_like(call, model), labels, model, gradients)
                _check_finite(views.values())
    tensors = named_tensors(model)
    return {g.name: views[g.name].observation(tensors, gradients, count) for g in groups}


@checked
def observe_for(
    importance: object,
    model: nn.Module,
    graph: ChannelGraph,
    groups: Iterable[ChannelGroup],
    images: ImagesLike | None,
    *,
    seed: Seed = 0,
) -> dict[str, Observation]:
    """What a criterion asks for in its `needs`; empty if it asks for nothing.

    Raises:
        ObservationError: it looks at images and there are none; names the criterion.
    """
    needs = needs_of(importance)
    check_images(f"importance {importance_label(importance)}", needs, images)
    return observe(model, graph, groups, images, needs, seed=seed)


def _run(call: Inputs, labels: Tensor | None, model: nn.Module, gradients: _Gradients) -> None:
    """One batch through the network."""
    if gradients.parameters:
        gradients.add(call, labels, count_images(call))
    else:
        call.call(model)


# ---- gradients ------------------------------------------------------------------------------------------------------


class _Gradients:
    """Mean gradient of the loss with respect to the parameters of some groups."""

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        names = {m.tensor for g in groups for m in g.members}
        self.model, self.images, self.again = model, 0, False
        self.parameters = {n: p for n, p in model.named_parameters() if n in names and p.is_floating_point()}
        self.sums: dict[str, Tensor] = {}

    def add(self, call: Inputs, labels: Tensor | None, count: int) -> None:
        with torch.enable_grad(), _require_gradients(self.parameters.values()):
            try:
                found = self.differentiate(call, labels, count)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                found = self.differentiate_in_place(call, labels, count)
        for name, gradient in zip(self.parameters, found, strict=True):
            gradient = torch.zeros_like(self.parameters[name]) if gradient is None else gradient.detach()
            _add(self.sums, name, gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * count)
        self.images += count

    def differentiate(self, call: Inputs, labels: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
        loss = _find_loss(_run_whole(call, self.model), labels, count, call.weights)
        _check_loss(loss, call)
        return torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)

    def differentiate_in_place(self, call: Inputs, labels: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
        """For networks that overwrite what gradients need: it is kept, which costs memory and a second forward pass."""
        self.again = True  # these images have been seen
        try:
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                return self.differentiate(call, labels, count)
        finally:
            self.again = False

    def of(self, group: ChannelGroup) -> dict[str, Tensor]:
        own = {m.tensor: self.parameters[m.tensor] for m in group.members if m.tensor in self.sums}
        return {name: (self.sums[name] / self.images).to(parameter.dtype) for name, parameter in own.items()}


def _run_whole(call: Inputs, model: nn.Module) -> Any:
    """What the network returns, whole."""
    return call.run(model)


@contextlib.contextmanager
def _require_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients can be taken inside, also of frozen parameters."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _find_loss(output: Any, labels: Tensor | None, count: int, weights: RowWeights | None = None) -> Tensor:
    """A scalar to differentiate, see `observe`."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1 and own.requires_grad:
        return own.reshape(())
    outputs = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in _find_floating(output)]
    if labels is None:
        outputs = [torch.where(t.isinf(), 0.0, t) for t in select_counted(outputs, weights)]  # masked classes
        return sum((t.square().sum() for t in outputs), start=outputs[0].new_zeros(())) / (2 * count)
    labels = labels.to(outputs[0].device)
    if labels.is_floating_point() and labels.shape == outputs[0].shape:
        return F.mse_loss(outputs[0], labels.to(outputs[0].dtype))
    return F.cross_entropy(class_scores(output, len(labels)).to(outputs[0].dtype), labels)


def _find_floating(output: Any) -> list[Tensor]:
    found = [t for t in output_tensors(output) if t.is_floating_point()]
    if not found:
        raise ModelError("gradients: expected a network that returns a floating-point tensor, got none.")
    return found


def _check_loss(loss: Tensor, call: Inputs) -> None:
    if not loss.requires_grad:
        raise ModelError("gradients: the network's output does not depend on its parameters; is its forward no_grad?")
    if not bool(torch.isfinite(loss)):
        raise ModelError(
            f"gradients: expected a finite loss on {call}, got {float(loss.detach())}; check the images' scale."
        )


# ---- channels -------------------------------------------------------------------------------------------------------


def _find_ports(model: nn.Module, group: ChannelGroup) -> list[Port]:
    """Where linear layers and convolutions read a group; if none does, where they produce it."""
    layers = {name: Layer(name, m) for name, m in model.named_modules() if is_linear_map(m)}
    members = [m for m in group.members if m.module in layers and m.tensor.endswith("weight")]
    readers = [m for m in members if Role.CONSUMES in m.roles and m.dim == layers[m.module].input_dim]
    makers = [m for m in members if Role.PRODUCES in m.roles and m.dim != layers[m.module].input_dim]
    return [Port.of(layers[m.module], m) for m in readers or makers]


@dataclass(eq=False)
class _View:
    """Gathers what is wanted of one group while batches pass; sums over images, by index of the port."""

    group: ChannelGroup
    ports: list[Port]
    wanted: frozenset[str]
    seed: int
    counts: Counter[int] = field(default_factory=Counter)
    means: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    shares: dict[int, Tensor] = field(default_factory=dict)
    maps: list[Tensor] = field(default_factory=list)
    broken: str | None = None
    weights: RowWeights | None = None

    @property
    def watches(self) -> bool:
        return bool(self.wanted & {"activations", "feature_maps", "contributions"})

    def add(self, index: int, x: Tensor, output: Tensor) -> None:
        """A layer ran."""
        port = self.ports[index]
        seen = (x if port.reads else output).detach()
        channels, counts = port.take_channels(seen), port.weigh_channels(seen, self.weights)
        if counts is not None:
            channels = torch.where(counts[:, None] > 0, channels, 0.0)
        if not bool(torch.isfinite(channels).all()):
            self.broken = port.layer.name
            return
        self.counts[index] += len(channels) if counts is None else int((counts > 0).any(1).sum())
        if "activations" in self.wanted:
            _add(self.means, index, _average_places(channels.double(), counts))
            _add(self.squares, index, _average_places(channels.double().square(), counts))
        if "contributions" in self.wanted and port.reads:
            _add(self.shares, index, _find_contributions(port, x.detach(), port.layer.weigh_rows(output, self.weights)))
        if "feature_maps" in self.wanted and index == next(iter(self.counts)):
            self.keep(port.layer.name, channels)

    def keep(self, name: str, channels: Tensor) -> None:
        """Keep the feature maps of the first images; of images of another size none."""
        left = MAPS - sum(map(len, self.maps))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        places = torch.randperm(channels.shape[2], generator=generator)[:PLACES].sort().values
        if left > 0 and (not self.maps or self.maps[0].shape[2] == len(places)):
            self.maps.append(channels[:left][..., places.to(channels.device)].float())

    def observation(self, tensors: Mapping[str, Tensor], gradients: _Gradients, images: int) -> Observation:
        average = lambda sums: torch.stack([s / self.counts[i] for i, s in sorted(sums.items())])  # noqa: E731
        statistics = Activations(average(self.means).mean(0), average(self.squares).mean(0)) if self.means else None
        return Observation(
            tensors={m.tensor: tensors[m.tensor].detach() for m in self.group.members},
            gradients=gradients.of(self.group) if "gradients" in self.wanted else None,
            activations=statistics,
            feature_maps=torch.cat(self.maps) if self.maps else None,
            contributions=average(self.shares) if self.shares else None,
            images=images,
        )


def _check_finite(views: Iterable[_View]) -> None:
    for view in views:
        if view.broken is not None:
            raise ModelError(f"{view.broken}: reads or gives NaN or infinity on these images; check their scale.")


def _add(sums: dict[Any, Tensor], key: object, value: Tensor) -> None:
    sums[key] = sums[key].add_(value) if key in sums else value


def _average_places(channels: Tensor, counts: Tensor | None) -> Tensor:
    """Mean over the places of channels (images, n, places), summed over images, (n,).

    Args:
        counts: how much each place counts, (images, places); None for all alike.
    """
    if counts is None:
        return channels.mean(2).sum(0)
    return torch.einsum("inp,ip->n", channels, weigh_within(counts))


def _find_contributions(port: Port, x: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Each channel's share of what a layer adds up, (n,) float64, summed over images.

    Share of input i in output k: |w_ki x_i| / sum_j |w_kj x_j|, 0 where all are 0; summed over the outputs k and over
    the entries of a channel, mean over the places of the output.

    With a = |x| and D = |W| a this is a * d(sum log D)/da: one forward and one backward pass of the layer.

    Args:
        counts: how much each place of the output counts; None for all alike.
    """
    precise = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))  # noqa: E731
    module = port.layer.module
    twin = copy.copy(module)
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    assert weight is not None
    absolute = precise(weight.detach().abs())
    twin.__dict__["_parameters"] = {
        "weight": absolute,
        "bias": None if bias is None else torch.zeros_like(precise(bias.detach())),
    }
    with torch.enable_grad():
        a = precise(x.abs()).requires_grad_()
        totals = twin.forward(a)
        totals = totals.movedim(port.layer.channel_dim, -1)
        logs = totals.clamp(min=torch.finfo(totals.dtype).tiny).log()
        if counts is not None:
            logs = torch.where(counts[..., None] > 0, logs, 0.0)
            logs = logs * weigh_within(counts.reshape(len(counts), -1)).reshape(*counts.shape, 1).to(logs)
        slope = torch.autograd.grad(logs.sum(), a)[0]
    shares = port.take_channels((a.detach() * slope).nan_to_num(0.0) if counts is not None else a.detach() * slope)
    factor = 1.0 if counts is not None else len(shares) / totals[..., 0].numel()
    return shares.double().sum((0, 2)) * factor


@contextlib.contextmanager
def _watch(views: Iterable[_View], gradients: _Gradients) -> Iterator[None]:
    """Show every view the layers it is interested in, once for each image."""
    ports = {(view, index): port for view in views if view.watches for index, port in enumerate(view.ports)}

    def called(key: tuple[_View, int], x: Tensor, output: Any) -> None:
        view, index = key
        if not gradients.again:
            view.add(index, x, output)

    with watch_calls({key: port.layer.module for key, port in ports.items()}, called, history=True):
        yield
