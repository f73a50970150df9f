"""What a case of the gallery is: a small network, an example input, and the truth about its channels, found by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
Sizes = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Expect:
    """What must be found. Found by reasoning about the network, never by running a tracer.

    Modules are named by prefix ("stem" stands for "stem.0" too), several separated by spaces; a parameter of the
    network itself has no name, so "" stands for a group that only such parameters produce.

    Attributes:
        groups: producing modules -> size (or sizes) of the reducible channel groups they produce together.
        complete: whether `groups` lists every reducible channel group.
        blocks: the same for groups of whole blocks (heads, convolution groups); never complete.
        blocked: module -> part of the reason why no channel it produces can be reduced ("" for any reason).
        unmixable: producing modules of groups that must be marked as unmixable.
        warns: part of one of the graph's warnings.
    """

    groups: Sizes = field(default_factory=dict)
    complete: bool = False
    blocks: Sizes = field(default_factory=dict)
    blocked: Mapping[str, str] = field(default_factory=dict)
    unmixable: tuple[str, ...] = ()
    warns: str = ""


@dataclass(frozen=True, eq=False)
class Case:
    """One network of the gallery. `probe` makes a second input on which the channels must be interchangeable too."""

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    expect: Expect
    probe: Callable[[], Inputs] | None = None

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(
    groups: Sizes | None = None,
    *,
    partial: bool = False,
    blocks: Sizes | None = None,
    blocked: Mapping[str, str] | None = None,
    unmixable: tuple[str, ...] = (),
    warns: str = "",
    probe: Callable[[], Inputs] | None = None,
) -> Callable[[Callable[[], tuple[nn.Module, Inputs]]], Callable[[], tuple[nn.Module, Inputs]]]:
    """Enter a builder into the gallery. `groups` lists every reducible channel group unless `partial`."""
    complete = groups is not None and not partial
    expect = Expect(groups or {}, complete, blocks or {}, blocked or {}, unmixable, warns)

    def register(build: Callable[[], tuple[nn.Module, Inputs]]) -> Callable[[], tuple[nn.Module, Inputs]]:
        CASES.append(Case(build.__name__, seeded(build), expect, probe))
        return build

    return register


def seeded(build: Callable[[], tuple[nn.Module, Inputs]]) -> Callable[[], tuple[nn.Module, Inputs]]:
    """The same weights and inputs on every call, without touching the caller's random state."""

    def run() -> tuple[nn.Module, Inputs]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, inputs = build()
        return model.eval(), inputs

    return run


class Wired(nn.Module):
    """Named modules and parameters, and a function of (net, inputs) that says how they are connected."""

    def __init__(self, wiring: Callable[..., Any], /, **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wiring(self, *args, **kwargs)


def chain(**layers: nn.Module) -> nn.Sequential:
    """A plain sequence with names."""
    return nn.Sequential(OrderedDict(layers))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def image(channels: int = 3, size: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


def pooled(x: Tensor) -> Tensor:
    """Mean over space."""
    return x.mean((2, 3))
