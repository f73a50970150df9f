"""Rows of what a network gave at sampled places, over all batches, on a shelf until they are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.network.layers import sample_places
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.restore.live import is_plain
from intrafusion.restore.places import PlaceSampler, find_images
from intrafusion.restore.shelf import Shelf

_LATE = 1e9  # when they are due: after all that is needed again and again, as they are needed once


@dataclass(eq=False)
class RowStore:
    """By the name of a layer, what is known at its places.

    Attributes:
        places: of each batch, (k, dims).
        weights: how much each row of all batches counts, (k, 1); None for all alike.
        images: which of all images each row is of, (k,) int64; see `find_images`. Where that is not seen, stretches of
            rows stand for images.
    """

    sampler: PlaceSampler
    shelf: Shelf
    places: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.counts: dict[str, list[Tensor | None]] = {}
        self.owners: dict[str, list[Tensor | None]] = {}
        self.kept: dict[str, list[Tensor]] = {}
        self.lacking: dict[str, Tensor] = {}
        self.stored = 0

    __repr__ = show_briefly

    @property
    def count(self) -> int:
        """Images in all batches."""
        return sum(self.sampler.counts)

    def sample(
        self, name: str, batch: int, rows: Tensor, counts: Tensor | None, total: int, limit: int | None = None
    ) -> Tensor | None:
        """Places of the next batch, (k, dims); None where the batch does not fit the first one.

        Args:
            rows: what is looked at, its channels last.
            counts: how much each place counts, of the shape without channels; None for all alike.
            total: images in this batch.
            limit: of places, where this layer has one of its own.
        """
        found = self.places.setdefault(name, [])
        if len(found) != batch:
            return None
        chosen = self.sampler.choose(name, batch, tuple(rows.shape[:-1]), counts, limit)
        if chosen is None:
            return None
        places = chosen.to(rows.device)
        found.append(places)
        self.counts.setdefault(name, []).append(None if counts is None else counts[tuple(places.T)])
        own = find_images(places, rows.shape[:-1], total)
        before = sum(self.sampler.counts[:batch])
        self.owners.setdefault(name, []).append(None if own is None else own + before)
        return places

    def put(self, name: str, batch: int, rows: Tensor) -> None:
        """What was given at these places, (k, c); in place of what was put there before."""
        own = self.rows.setdefault(name, {})
        if batch in own:
            self.shelf.drop((self, name, batch))
        own[batch] = rows
        self.stored += 1
        self.shelf.lay((self, name, batch), [rows.untyped_storage()] if is_plain(rows) else [], _LATE + self.stored)

    def add(self, name: str, row: Tensor) -> None:
        """To each of the rows, when they are taken."""
        self.lacking[name] = row

    def adopt(self, name: str, other: str) -> None:
        """The rows of another name in place of its own."""
        self.forget(name)
        self.rows[name] = self.rows.pop(other)
        for batch in self.rows[name]:
            self.shelf.rename((self, other, batch), (self, name, batch))

    def forget(self, name: str) -> None:
        for batch in self.rows.pop(name, {}):
            self.shelf.drop((self, name, batch))

    def finish(self, together: Collection[Sequence[str]] = ()) -> None:
        """After the last batch: of more places than are wanted, some remain.

        Args:
            together: names that have as many as one, such as of a layer's calls.
        """
        for name in self.rows:
            if (kept := self.sampler.list_kept(name)) is not None:
                self._keep(name, kept)
        for names in together:
            self._thin(names)
        for name in self.rows:
            owners = [t for t in self.owners[name] if t is not None]
            self.weights[name] = self.weigh([name])
            total = sum(map(len, self.places[name]))
            if sum(map(len, owners)) < total:  # stretches of rows stand for images
                owners = [torch.arange(total, device=self.places[name][0].device) * self.count // total]
            self.images[name] = torch.cat(owners)

    def weigh(self, names: Sequence[str]) -> Tensor | None:
        """How much each row of these names counts among them, (k, 1) of mean 1; None for all alike."""
        counts = [t for name in names for t in self.counts[name] if t is not None]
        return weigh_evenly(torch.cat(counts)) if counts else None

    def take(self, name: str) -> Tensor:
        """The rows of all batches, (k, c); they are not kept any longer."""
        found = join_rows(self._fetch(name), sum(map(len, self.places[name])))
        return found + self.lacking[name].to(found) if name in self.lacking else found

    def _fetch(self, name: str) -> Iterator[Tensor]:
        """The rows of each batch, one after another; only the one that is given out is there."""
        rows, kept = self.rows.pop(name), self.kept.get(name)
        for index, batch in enumerate([*rows]):
            self.shelf.take((self, name, batch))
            own = rows.pop(batch)
            yield own if kept is None else own[kept[index].to(own.device)]

    def _keep(self, name: str, kept: Sequence[Tensor]) -> None:
        """Of what was kept before, (k,) of True and False for each batch."""
        self.places[name] = _take(self.places[name], kept)
        self.counts[name] = [None if c is None else c[k] for c, k in zip(self.counts[name], kept, strict=True)]
        self.owners[name] = [None if o is None else o[k] for o, k in zip(self.owners[name], kept, strict=True)]
        before = self.kept.get(name)
        if before is not None:
            kept = [old.masked_scatter(old, new) for old, new in zip(before, kept, strict=True)]
        self.kept[name] = list(kept)

    def _thin(self, names: Sequence[str]) -> None:
        """Of each as large a part as of the others; the same places wherever batches are cut."""
        sizes = {name: [len(own) for own in self.places[name]] for name in names}
        total, limit = sum(map(sum, sizes.values())), self.sampler.limits[names[0]]
        for name, own in sizes.items() if total > limit else ():
            mask = torch.zeros(sum(own), dtype=torch.bool)
            mask[sample_places(name, (len(mask),), len(mask) * limit // total, self.sampler.seed)[:, 0]] = True
            self._keep(name, mask.split(own))


def join_rows(parts: Iterable[Tensor], total: int) -> Tensor:
    """Rows (r, c) of parts, of which there are so many in all: as they come, so that they are not there twice."""
    found, start = None, 0
    for part in parts:
        if len(part) == total:
            return part
        found = part.new_empty(total, *part.shape[1:]) if found is None else found
        found[start : start + len(part)] = part
        start += len(part)
    assert found is not None
    return found


def _take(tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
    return [tensor[mask.to(tensor.device)] for tensor, mask in zip(tensors, kept, strict=True)]
