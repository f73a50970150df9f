"""Images that are kept from whatever is fitted, so that what is measured on them means something."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.network.batches import ImagesLike, cast_like, count_images, join_batches, take_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state

_SHARE, _MOST, _FEWEST = 5, 64, 10  # one in five, and never more or fewer than these
_SAME, _ROUNDINGS = 1e-3, 16  # of the size of the outputs: what other shapes of a batch may change by rounding


@dataclass(frozen=True, eq=False)
class Split:
    """Images in two parts.

    Attributes:
        seen: those that may be fitted to; None where no images were given.
        measured: those that errors are measured on, as one call.
        unseen: whether they are none of `seen`.
    """

    seen: ImagesLike | None = None
    measured: Inputs | None = None
    unseen: bool = False

    __repr__ = show_briefly


def hold_out(images: Iterable[Inputs], model: nn.Module) -> Split:
    """One in five of the images, at most 64, spread evenly over all of them, are kept apart.

    None are where that would be fewer than 10, or where the network does not treat the rows of a batch one by one.

    Raises:
        ModelError: batches of different arguments or shapes, or none.
    """
    calls = list(images)
    places = held_out_places(sum(map(count_images, calls)))
    if not len(places):
        return Split(calls)
    parts, start = list[tuple[Inputs | None, Inputs | None]](), 0
    for call in calls:
        stop = start + count_images(call)
        parts.append(_part(call, places[(places >= start) & (places < stop)] - start))
        start = stop
    held = join_batches([apart for _, apart in parts if apart is not None])
    if not _is_row_by_row(model, held):
        return Split(calls)
    return Split([seen for seen, _ in parts if seen is not None], replace(held, source="images"), unseen=True)


def take_first(images: Iterable[Inputs], *, unseen: bool) -> Split:
    """All of the images may be fitted to, and at most 64 of the first batch are measured on.

    Args:
        unseen: whether nothing will be fitted.
    """
    return Split(images, take_images(next(iter(images)), 0, _MOST), unseen)


def held_out_places(total: int) -> Tensor:
    """Which of so many images are kept apart, (k,) in rising order; none of them where there are few.

    >>> held_out_places(50).tolist(), len(held_out_places(49)), len(held_out_places(10_000))
    ([2, 7, 12, 17, 22, 27, 32, 37, 42, 47], 0, 64)
    """
    count = min(_MOST, total // _SHARE)
    if count < _FEWEST:
        return torch.arange(0)
    return (torch.arange(count) * total + total // 2) // count


def pick_images(call: Inputs, places: Tensor) -> Inputs:
    """These images of a batch, labels with them; what is not one per image stays."""
    total = count_images(call)

    def pick(value: object) -> object:
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == total
        return value[places.to(value.device)] if batched and isinstance(value, Tensor) else value

    labels = None if call.labels is None else call.labels[places.to(call.labels.device)]
    weights = None if call.weights is None else call.weights.map(lambda table: table[places.to(table.device)])
    parts = tree_map(pick, call.args), tree_map(pick, call.kwargs)
    return replace(call, args=parts[0], kwargs=parts[1], labels=labels, weights=weights)


def _part(call: Inputs, apart: Tensor) -> tuple[Inputs | None, Inputs | None]:
    """A batch without these images, and these images of it; None where nothing is left."""
    total = count_images(call)
    if not len(apart):
        return call, None
    rest = torch.ones(total, dtype=torch.bool)
    rest[apart] = False
    return pick_images(call, rest.nonzero()[:, 0]) if bool(rest.any()) else None, pick_images(call, apart)


def _is_row_by_row(model: nn.Module, images: Inputs) -> bool:
    """Whether the answers to some of the images are the same where others stand beside them.

    Not so where the first dimension is time, or the nodes of a graph, or where the batch itself is normalised.
    """
    count = count_images(images)
    some = torch.arange(1, count, 2)
    try:
        with preserve_state(model):
            whole = cast_like(images, model).call(model)
            part = cast_like(pick_images(images, some), model).call(model)
    except ModelError:
        return False
    whole, part = ([t for t in found if t.dim()] for found in (whole, part))  # a loss has no rows
    alike = all(_is_picked(a, b, some, count) for a, b in zip(whole, part, strict=False))
    return 0 < len(whole) == len(part) and alike


def _is_picked(whole: Tensor, part: Tensor, places: Tensor, count: int) -> bool:
    if len(whole) != count or part.shape != (len(places), *whole.shape[1:]):
        return False
    wanted = whole[places.to(whole.device)]
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return True  # numbers picked or counted: a tie may fall either way
    size = float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if wanted.numel() else 0.0
    share = max(_SAME, _ROUNDINGS * torch.finfo(wanted.dtype).eps)
    return torch.allclose(part, wanted, rtol=0, atol=share * size + 1e-12, equal_nan=True)
