"""Images that are kept from whatever is fitted, so that what is measured on them means something."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.network.batches import ImagesLike, reading, take_images
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import Inputs

_SHARE, _MOST, _FEWEST = 5, 64, 10  # one in five, and never more or fewer than these


@dataclass(frozen=True, eq=False)
class Split:
    """Images in two parts.

    Attributes:
        seen: those that may be fitted to; None where no images were given.
        measured: those that errors are measured on.
        unseen: whether they are none of `seen`.
    """

    seen: ImagesLike | None = None
    measured: Batches | None = None
    unseen: bool = False

    __repr__ = show_briefly


def hold_out(images: Iterable[Inputs], model: nn.Module, memory: int | None = None) -> Split:
    """One in five of the images, at most 64, spread evenly over all of them, are kept apart.

    None are where that would be fewer than 10, or where the network does not treat the rows of a batch one by one.

    Args:
        memory: bytes that what goes over the images may take; see `read_input_batches`.
    Raises:
        ModelError: no batch.
        RecipeError: less memory than one image takes.
    """
    batches = read_input_batches(images, model, memory)
    places = held_out_places(batches.count)
    if not len(places) or batches.size is None:
        return Split(batches)
    rest = torch.ones(batches.count, dtype=torch.bool)
    rest[places] = False
    held = batches.part(places).kept()
    return Split(batches.part(rest.nonzero()[:, 0]), held.then(_name_images), True)


def take_first(images: Iterable[Inputs], *, unseen: bool) -> Split:
    """All of the images may be fitted to, and at most 64 of the first batch are measured on.

    Args:
        unseen: whether nothing will be fitted.
    """
    with reading(images) as calls:
        return Split(images, Batches.of(take_images(next(calls), 0, _MOST)), unseen)


def held_out_places(total: int) -> Tensor:
    """Which of so many images are kept apart, (k,) in rising order; none of them where there are few.

    >>> held_out_places(50).tolist(), len(held_out_places(49)), len(held_out_places(10_000))
    ([2, 7, 12, 17, 22, 27, 32, 37, 42, 47], 0, 64)
    """
    count = min(_MOST, total // _SHARE)
    if count < _FEWEST:
        return torch.arange(0)
    return (torch.arange(count) * total + total // 2) // count


def _name_images(call: Inputs) -> Inputs:
    return replace(call, source="images")
