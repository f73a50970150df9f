"""Inputs as a sequence of calls of a few images each: as they came, cut or put together when they are asked for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.network.batches import (
    ImagesLike,
    count_images,
    is_held,
    join_batches,
    name_inputs,
    pick_images,
    read_labelled,
    reading,
    share_out,
    take_images,
)
from intrafusion.network.free_memory import choose_memory
from intrafusion.network.inputs import Inputs
from intrafusion.network.pass_memory import check_memory, choose_size, count_bytes
from intrafusion.network.rows_apart import is_row_by_row
from intrafusion.network.shares import Share

_KEPT = 2  # of the memory for what a loader gives, one part in so many
_FEW = 4  # images on which it is looked whether rows are answered one by one


@dataclass(frozen=True, eq=False)
class _Form:
    """What a call is like.

    Attributes:
        key: what calls have in common that can be one: arguments, shapes but for the number of images, weights.
        joins: whether all of its tensors have a row for each image.
        positions: that count, of each image, (n,).
        kind: what it is of, in the plural.
    """

    key: tuple[Any, ...]
    joins: bool
    positions: Tensor
    weighed: bool
    kind: str

    @classmethod
    def of(cls, call: Inputs) -> _Form:
        leaves, tree = tree_flatten((call.args, dict(call.kwargs or {})))
        count, tensors, weights = count_images(call), [t for t in leaves if isinstance(t, Tensor)], call.weights
        shapes = tuple((t.dtype, t.device, tuple(t.shape[1:])) for t in tensors)
        tables = () if weights is None else tuple(tuple(t.shape[1:]) for t in weights.tables)
        labels = None if call.labels is None else (call.labels.dtype, call.labels.device, call.labels.shape[1:])
        rest = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        first = next((t for t in tensors if t.dim()), None)
        each = torch.full(
            (count,), 1.0 if first is None else float(max(1, math.prod(first.shape[1:]))), dtype=torch.float64
        )
        if tables and weights is not None:
            each = (weights.tables[0] > 0).sum(1).double().cpu()
        joins = all(t.layout is torch.strided and t.dim() > 0 and len(t) == count for t in tensors)
        key = str(tree), shapes, tables, labels, rest, weights is None
        return cls(key, joins, each, weights is not None, name_inputs(call))

    @property
    def count(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class _Cut:
    """Images of one of the calls that came."""

    call: int
    places: Tensor

    def of(self, call: Inputs) -> Inputs:
        return call if len(self.places) == count_images(call) else pick_images(call, self.places)


@dataclass(frozen=True, eq=False)
class Batches(Sequence[Inputs]):
    """Inputs as calls of a network. What they are cut out of is not copied, and only one of them is made at a time.

    Attributes:
        came: the calls as they came, in memory or read anew each time.
        forms: what each of them is like.
        cuts: of which images of which calls each batch is.
        size: images in a batch at most; None where calls stay as they came, as the network might not answer each image
            by itself.
        memory: bytes that what goes over all of them may take; None: half of what is free.
        changes: what is done to each batch, in order.
        kept_bytes: that the calls take in memory, where whoever gave them does not hold them.
    """

    came: Sequence[Inputs] | _Anew
    forms: tuple[_Form, ...]
    cuts: tuple[tuple[_Cut, ...], ...]
    size: int | None = None
    memory: int | None = None
    changes: tuple[Callable[[Inputs], Inputs], ...] = ()
    kept_bytes: int = 0

    __repr__ = show_briefly

    @classmethod
    def of(cls, *calls: Inputs) -> Batches:
        """Calls that stay as they are."""
        forms = tuple(map(_Form.of, calls))
        return cls(calls, forms, tuple((_Cut(i, torch.arange(form.count)),) for i, form in enumerate(forms)))

    @property
    def count(self) -> int:
        """Images in all of them."""
        return sum(map(_count, self.cuts))

    @property
    def counts(self) -> list[int]:
        """Images in each of them."""
        return list(map(_count, self.cuts))

    @property
    def is_kept(self) -> bool:
        """Whether all of them are in memory; else they are read anew for each pass."""
        return not isinstance(self.came, _Anew)

    @property
    def first(self) -> Inputs:
        with reading(self) as calls:
            return next(calls)

    @property
    def kind(self) -> str:
        """What they are of, in the plural."""
        return self.forms[self.cuts[0][0].call].kind

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[Inputs]:
        """In order; each of the calls that came is read once."""
        with reading(self.came) as calls:
            yield from self._cut_out(enumerate(calls))

    def _cut_out(self, stream: Iterator[tuple[int, Inputs]]) -> Iterator[Inputs]:
        at, held = -1, dict[int, Inputs]()
        for cuts in self.cuts:
            while at < cuts[-1].call:
                at, call = next(stream)
                if at >= cuts[0].call:
                    held[at] = call
            parts = [cut.of(held[cut.call]) for cut in cuts]
            held = {i: call for i, call in held.items() if i >= cuts[-1].call}
            batch = parts[0] if len(parts) == 1 else join_batches(parts)
            for change in self.changes:
                batch = change(batch)
            yield batch
        if at + 1 == len(self.forms):
            next(stream, None)  # whether there are more now than there were

    @overload
    def __getitem__(self, index: int) -> Inputs: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Inputs | Batches:
        if isinstance(index, slice):
            return replace(self, cuts=self.cuts[index])
        return replace(self, cuts=(self.cuts[index],)).first

    def take(self, count: int) -> Batches:
        """The first so many images."""
        return self.part(torch.arange(min(count, self.count)))

    def part(self, places: Tensor) -> Batches:
        """The images at these places among all, in rising order."""
        taken, start = dict[int, list[Tensor]](), 0
        for cut in (cut for cuts in self.cuts for cut in cuts):
            stop = start + len(cut.places)
            inside = places[(places >= start) & (places < stop)] - start
            if len(inside):
                taken.setdefault(cut.call, []).append(cut.places[inside])
            start = stop
        cuts = [_Cut(call, torch.cat(found)) for call, found in taken.items()]
        return replace(self, cuts=tuple(_cut(self.forms, cuts, self.size)))

    def then(self, change: Callable[[Inputs], Inputs]) -> Batches:
        """With each batch changed, once it is made."""
        return replace(self, changes=(*self.changes, change))

    def kept(self) -> Batches:
        """In memory, as they are; for a few that would be read anew together with many others."""
        return self if self.is_kept else replace(Batches.of(*self), memory=self.memory)

    def join(self) -> Inputs:
        """All as one call.

        Raises:
            ModelError: batches of different arguments or shapes.
        """
        return join_batches(list(self))

    def shared(self) -> Iterator[tuple[Inputs, Share]]:
        """Each with the part of all that it is, for samples over all of them."""
        used = {cut.call for cuts in self.cuts for cut in cuts}
        even = len({self.forms[i].key for i in used}) == 1 and not any(self.forms[i].weighed for i in used)
        own = [float(sum(self.forms[cut.call].positions[cut.places].sum() for cut in cuts)) for cuts in self.cuts]
        start, total = 0, self.count
        for index, (call, count) in enumerate(zip(self, self.counts, strict=True)):
            yield call, Share(start, count, total, even, sum(own[:index]), own[index], max(1.0, sum(own)))
            start += count

    def __str__(self) -> str:
        return f"{self.count} {self.kind}"


def _count(cuts: Iterable[_Cut]) -> int:
    return sum(len(cut.places) for cut in cuts)


@dataclass(frozen=True, eq=False)
class _Anew:
    """Calls that do not fit into memory together: they are read each time, and have to be what they were."""

    images: ImagesLike
    sums: tuple[int, ...]

    def __iter__(self) -> Iterator[Inputs]:
        index = -1
        with reading(_read_calls(self.images)) as calls:
            for index, call in enumerate(calls):
                if index >= len(self.sums):
                    raise ModelError(_complain(f"more than {len(self.sums)} batches, which it gave first"))
                if _sum_up(call) != self.sums[index]:
                    raise ModelError(_complain(f"another batch {index} than it gave first"))
                yield call
        if index + 1 < len(self.sums):
            raise ModelError(_complain(f"{index + 1} batches, and {len(self.sums)} first"))


def _complain(got: str) -> str:
    return (
        f"images: expected the same each time that they are read, as memory= does not hold them all, got {got}; "
        "let the loader neither shuffle nor draw random numbers, or give more memory."
    )


def _sum_up(call: Inputs) -> int:
    """A checksum of all that a call holds."""
    total = 0
    for tensor in call.tensors():
        total = zlib.crc32(str((tensor.dtype, tuple(tensor.shape))).encode(), total)
        whole = (tensor if tensor.layout is torch.strided else tensor.to_dense()).detach().cpu().contiguous().flatten()
        values: Any = whole.view(torch.uint8).numpy() if whole.numel() else b""
        total = zlib.crc32(values, total)
    return total


# ---- reading and cutting --------------------------------------------------------------------------------------------


def read_input_batches(images: ImagesLike, model: nn.Module | None = None, memory: int | None = None) -> Batches:
    """The images in batches that go well through a network.

    Batches of a loader stay as they are, but large ones are cut and small ones put together, where the network answers
    each image by itself; otherwise calls stay as they came. What a loader gives is kept up to half of the memory, and
    read anew each time where it is more, unless it can be read only once.

    Args:
        model: None: they stay as they came.
        memory: bytes that may be taken; None: half of what is free.
    Raises:
        ModelError: no images, or such as the network does not run on.
        RecipeError: less memory than one image takes.
    """
    if isinstance(images, Batches):
        return images if memory is None else replace(images, memory=memory)
    came, forms = _read(images, choose_memory(memory) // _KEPT)
    everything = tuple((_Cut(i, torch.arange(form.count)),) for i, form in enumerate(forms))
    kept = 0 if isinstance(came, _Anew) or is_held(images) else sum(map(count_bytes, came))
    found = Batches(came, forms, everything, memory=memory, kept_bytes=kept)
    return found if model is None else _cut_for(found, model)


def _read(images: ImagesLike, room: int) -> tuple[Sequence[Inputs] | _Anew, tuple[_Form, ...]]:
    """The calls, as far as there is room for them, and what each is like."""
    kept, forms, sums, held, stays = list[Inputs](), list[_Form](), list[int](), 0, is_held(images)
    for call in _read_calls(images):
        forms.append(_Form.of(call))
        held += count_bytes(call)
        kept.append(call)
        if held > room and not stays:
            sums += map(_sum_up, kept)
            kept.clear()
    return (_Anew(images, tuple(sums)) if sums else kept), tuple(forms)


def _read_calls(images: ImagesLike) -> Iterator[Inputs]:
    with reading(read_labelled(images)) as calls:
        for call, labels in calls:
            yield call if call.labels is not None else replace(call, labels=labels)


def _cut_for(found: Batches, model: nn.Module) -> Batches:
    """In batches of a size that suits the network, where it allows that."""
    size = _find_size(found, model)
    if size is None:
        return found
    cuts = [cut for cuts in found.cuts for cut in cuts]
    return replace(found, cuts=tuple(_cut(found.forms, cuts, size)), size=size)


def _find_size(found: Batches, model: nn.Module) -> int | None:
    """How many images a batch should have at most; None where the network does not answer them one by one.

    Raises:
        RecipeError: what was said of memory is too little for it.
    """
    some = _take_few(found)
    try:
        if count_images(some) > 1 and is_row_by_row(model, some):
            return choose_size(model, some, found.memory)
        if found.memory is not None:
            check_memory(model, found.first, found.memory)
    except ModelError:  # whoever needs the outputs says what is wrong
        pass
    return None


def _take_few(found: Batches) -> Inputs:
    """The first images that can be one call, of whichever batches."""
    few, total = list[Inputs](), 0
    with reading(found) as calls:
        for form, call in zip(found.forms, calls, strict=False):
            if few and (form.key != found.forms[0].key or not form.joins):
                break
            few.append(take_images(call, 0, _FEW - total))
            total += count_images(few[-1])
            if total >= _FEW:
                break
    return join_batches(few)


def _cut(forms: Sequence[_Form], parts: Iterable[_Cut], size: int | None) -> Iterator[tuple[_Cut, ...]]:
    """Batches of up to so many images: calls as they are, large ones in equal parts, small neighbours together."""
    if size is None:
        yield from ((part,) for part in parts)
        return
    waiting, total = list[_Cut](), 0
    for part in (_Cut(whole.call, places) for whole in parts for places in share_out(whole.places, size)):
        form = forms[part.call]
        alike = bool(waiting) and form.joins and forms[waiting[0].call].joins and form.key == forms[waiting[0].call].key
        if waiting and not (alike and total + len(part.places) <= size):
            yield tuple(waiting)
            waiting, total = [], 0
        waiting.append(part)
        total += len(part.places)
    if waiting:
        yield tuple(waiting)
