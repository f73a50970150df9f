"""Samples of places over all images, drawn while these go through a network in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intrafusion.network.layers import sample_places, unravel


@dataclass(frozen=True)
class Share:
    """Which part of all inputs a batch is.

    Attributes:
        start, count: its images.
        total: images in all.
        even: whether all inputs have one shape, and no position counts less than another.
        before: positions that count in the batches before it; own: in this one; whole: in all.
    """

    start: int
    count: int
    total: int
    even: bool
    before: float
    own: float
    whole: float

    @property
    def is_all(self) -> bool:
        return self.count == self.total


ALL = Share(0, 1, 1, even=True, before=0, own=1, whole=1)
"""Of inputs that are one call."""


@dataclass
class ShareSampler:
    """Draws up to `rows` places over all images for each layer, a batch at a time.

    Where images have one shape these are the places that one call of all of them would give, whatever the batches are.
    Else each batch gives as many as it has of all positions that count.
    """

    rows: int
    seed: int
    _drawn: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    def draw(
        self, name: str, shape: tuple[int, ...], share: Share, counts: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Places of what a layer reads or gives in this batch, (k, dims), in order, and how many each stands for.

        Args:
            shape: of that, without channels.
            counts: how much each place counts, in that shape; places that do not are left out.
        """
        if share.is_all:
            return sample_places(name, shape, self.rows, self.seed, counts), 1.0
        if share.even and counts is None and shape and shape[0] % share.count == 0:
            return self._take(name, shape, share), 1.0
        upto = lambda passed: math.floor(self.rows * passed / share.whole)  # noqa: E731
        limit = upto(share.before + share.own) - upto(share.before)
        places = sample_places(f"{name} {share.start}", shape, limit, self.seed, counts)
        available = math.prod(shape) if counts is None else int((counts > 0).sum())
        return places, available / max(1, len(places))

    def _take(self, name: str, shape: tuple[int, ...], share: Share) -> Tensor:
        """The places of the whole that lie in this batch."""
        each = math.prod(shape) // share.count  # places of an image
        whole = each * share.total
        if (name, whole) not in self._drawn:
            self._drawn[name, whole] = sample_places(name, (whole,), self.rows, self.seed)[:, 0]
        drawn = self._drawn[name, whole]
        first, last = torch.searchsorted(drawn, torch.tensor([share.start, share.start + share.count]) * each).tolist()
        return unravel(drawn[first:last] - share.start * each, shape)
