"""Networks and images to try a method on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, ModelError
from intrafusion.graph import READS, ChannelGraph, ChannelGroup
from intrafusion.inspection import inspect
from intrafusion.network.batches import read_batches
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.surgery.maps import narrow_to


class _Example(nn.Module):
    """A stream that two layers give and two read, an inner group, a linear head; with batch norms or with biases."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=not norms), norm(8)
        self.first, self.norm1 = nn.Conv2d(8, 10, 3, padding=1, bias=not norms), norm(10)
        self.second, self.norm2 = nn.Conv2d(10, 8, 3, padding=1, bias=not norms), norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True, eq=False)
class Case:
    """A network and images to try a method on."""

    name: str
    model: nn.Module
    graph: ChannelGraph
    inputs: Inputs
    images: Any

    __repr__ = show_briefly

    @property
    def groups(self) -> list[ChannelGroup]:
        return [g for g in self.graph.reducible if g.is_channel]

    @property
    def mixable(self) -> list[ChannelGroup]:
        return [g for g in self.groups if g.unmixable is None and g.size > 1]

    @property
    def unlabelled(self) -> Any:
        images = self.images
        return images[0][0] if isinstance(images, list) and isinstance(images[0], tuple) else images

    def with_model(self, name: str, change_: Callable[[nn.Module], None]) -> Case:
        model = copy_model(self.model)
        with torch.no_grad():
            change_(model)
        return replace(self, name=f"{self.name}, {name}", model=model)

    def half_dead(self) -> Case:
        """Every other channel of every group is zero."""
        return self.with_model("half of the channels dead", lambda model: _dead_(model, self.mixable, 2))

    def dead(self) -> Case:
        return self.with_model("all channels dead", lambda model: _dead_(model, self.mixable, 1))

    def duplicated(self) -> Case:
        """Channel c + n // 2 of every group is channel c; batch norms know the images; all in float64."""
        images = Inputs.of(self.unlabelled).double()

        def change_(model: nn.Module) -> None:
            _duplicate_(model.double(), self.mixable)
            _set_statistics_(model, images)

        return replace(self.with_model("channels duplicated", change_), inputs=self.inputs.double(), images=images)


def example_cases(seed: int) -> list[Case]:
    """With batch norms, and without; both in evaluation mode, with numbers no initialisation would give."""
    cases = []
    for name, norms in (("a network with batch norms", True), ("a network without norms", False)):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            model, images = _Example(norms), torch.randn(24, 3, 6, 6)
            for tensor_name, tensor in model.named_parameters():
                if tensor.dim() == 1:
                    tensor.uniform_(0.3, 1.5) if tensor_name.startswith("norm") else tensor.uniform_(-0.5, 0.5)
            _set_statistics_(model, Inputs.of(images))
        labels = torch.arange(24) % 5
        inputs = Inputs.of(images[:2])
        cases.append(Case(name, model.eval(), inspect(model, inputs), inputs, [(images, labels)]))
    return cases


def user_case(model: nn.Module, example_inputs: ExampleInputs | None, images: Any) -> Case:
    if example_inputs is None:
        raise ArgumentError(
            "example_inputs: expected what one call of the model takes, got None; pass it beside model=."
        )
    for call in read_batches(images) if images is not None else ():
        if not any(t.dim() for t in call.tensors()):
            raise ModelError(f"images: expected batches (n, ...), got {call}; put a dimension of images in front.")
    inputs, model = Inputs.of(example_inputs), copy_model(model)  # a broken method may write to it
    return Case(type(model).__name__, model, inspect(model, inputs), inputs, inputs if images is None else images)


def _incoming_rows(group: ChannelGroup, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor with the channel dimension first, positions (n, slots)) of all that makes a group's channels."""
    tensors = named_tensors(model)
    for member in group.members:
        if not member.roles & READS:
            tensor = tensors[member.tensor].data
            part = tensor if member.within is None else narrow_to(tensor, member.within)
            yield part.movedim(member.dim, 0), torch.from_numpy(member.positions)


def _dead_(model: nn.Module, groups: Iterable[ChannelGroup], step: int) -> None:
    for group in groups:
        for tensor, positions in _incoming_rows(group, model):
            tensor[positions[::step].flatten()] = 0


def _duplicate_(model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
    for group in groups:
        half = group.size // 2
        for tensor, positions in _incoming_rows(group, model):
            tensor[positions[half : 2 * half]] = tensor[positions[:half]]


def _set_statistics_(model: nn.Module, inputs: Inputs) -> None:
    """Set the statistics of batch norms to those of these images in one batch."""
    flags = [(m, m.training) for m in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    inputs.call(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, flag in flags:
        module.training = flag


def odd_modes_(model: nn.Module) -> None:
    """Training and evaluation mode, frozen and free, in turns."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
