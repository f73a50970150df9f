"""What a restorer is given, and what it may write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import ImagesLike
from intrafusion.network.inputs import Inputs
from intrafusion.plan import Plan
from intrafusion.registry import Traits


@runtime_checkable
class Reduced(Protocol):
    """A smaller network, the plan that made it, and one call of it."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def inputs(self) -> Inputs: ...


@dataclass(frozen=True, eq=False)
class ReducedNetwork:
    """These three and nothing else, of a network that is made to be judged."""

    model: nn.Module
    plan: Plan
    inputs: Inputs

    __repr__ = show_briefly


@runtime_checkable
class Restorer(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters; it makes up for what a reduction lost.

    It says whether it `needs_data`, see `RestorerTraits`.

    Args:
        compressed: the smaller network; weights of `compressed.model` are written in place, or, on an error, none.
        reference: the original network; left as it was.
        graph: the channel graph of the original network.
        images: unlabelled, as the networks take them; see `intrafusion.network.batches`.
    """

    needs_data: bool

    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None, /
    ) -> None: ...


@dataclass(frozen=True)
class RestorerTraits(Traits):
    """What a restorer says of itself, in attributes of these names.

    Attributes:
        needs_data: whether it works only with images.
        follows: what goes before it where it would be the first step of a recipe, as recipes call it.
    """

    needs_data: bool
    follows: str | None = None


def require_images(images: ImagesLike | None, restorer: Restorer) -> ImagesLike:
    """The images, for a restorer that cannot do without.

    Raises:
        ModelError: there are none.
    """
    if images is None:
        raise ModelError(
            f"{type(restorer).__name__} needs images: expected a few hundred unlabelled ones, got none; "
            "give images=..., or choose a restorer that needs none."
        )
    return images
