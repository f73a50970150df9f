"""What a reducer is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError
from intrafusion.graph import Rotation
from intrafusion.network.gram import WIDE, divide, find_scale, multiply_between, square_columns, square_transposed
from intrafusion.registry import Traits


@checked
@dataclass(frozen=True, eq=False)
class Moments:
    """What consumers read of n channels, at each of the p points where they read them, float64.

    Of channels that others are multiplied with and summed, such as queries: their second moment, and the others'.

    Attributes:
        means: (p, n).
        covariances: (p, n, n).
        squares: (n, n), sum over the consumers of W_c^T W_c, norms folded: squared change of what they give. None where
            `columns` are given, of which it is made when it is asked for (`reader`).
        bare: the same of what norms over the channels give before their gain, for groups that may be rotated, and
            behind it of what others read.
        plain: how many of the points, the last ones, are read by others than norms.
        columns: (k, n) of which the reader is columns^T columns, float32 or, where they are too large or small for it,
            float64; where there are many channels and k is small.
    Raises:
        ArgumentError: there are neither squares nor columns.
    """

    means: Tensor
    covariances: Tensor
    squares: Tensor | None
    bare: Moments | None = None
    plain: int = 0
    columns: Tensor | None = None

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        if self.squares is None and self.columns is None:
            raise ArgumentError("squares: expected what reads the channels, (n, n), or its columns, got neither.")

    @cached_property
    def reader(self) -> Tensor:
        """Sum over the consumers of W_c^T W_c, (n, n)."""
        if self.squares is not None:
            return self.squares
        assert self.columns is not None
        return square_columns(self.columns.T)

    def take_scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """New covariances, reader and shares in units in which the largest covariance and reading are about 1."""
        units = find_scale(self.covariances), find_scale(self.reader)
        scaled = divide(self.covariances, units[0], dtype), divide(self.reader, units[1], dtype)
        return *scaled, self._find_shares(*units).to(dtype)

    def take_readings(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same with C Q C (p, n, n), what the reader reads of the covariances, in place of the reader."""
        if self.columns is None:
            covariances, reader, shares = self.take_scaled(dtype)
            return covariances, multiply_between(covariances, reader), shares
        columns = (self.columns / find_scale(self.columns)).to(dtype)
        covariances = divide(self.covariances, find_scale(self.covariances), dtype)
        told = columns @ covariances  # fewer products than with the reader, where k < n / 2
        signals = (told * columns).sum((1, 2), dtype=torch.float64)
        return covariances, square_transposed(told.mT), _share_out(signals).to(dtype)

    @property
    def shares(self) -> Tensor:
        """What a unit of the consumers' signal counts at each point (p,): the signals of all points weigh the same.

        A point where nothing varies counts 0 beside others.
        """
        units = find_scale(self.covariances), find_scale(self.reader)
        return self._find_shares(*units) / units[0] / units[1]

    def _find_shares(self, *units: float) -> Tensor:
        """The same in these units, finite in float32."""
        parts = zip(self.covariances.split(WIDE, 1), self.reader.split(WIDE), strict=True)
        signals = sum((c / units[0] * (reader / units[1])).sum((1, 2)) for c, reader in parts)
        assert isinstance(signals, Tensor)
        return _share_out(signals)

    @property
    def overall(self) -> tuple[Tensor, Tensor]:
        """Mean (n,) and covariance (n, n) over all points, each weighing the same."""
        if len(self.means) == 1:
            return self.means[0], self.covariances[0]
        weights = self.shares / self.shares.sum()
        return weights @ self.means, torch.einsum("p,pij->ij", weights, self.covariances)


def _share_out(signals: Tensor) -> Tensor:
    """See `Moments.shares`."""
    return torch.where(signals >= 1e-12 * signals.max(), 1 / (signals.clamp(min=1e-30) * len(signals)), 0.0)


@checked
@dataclass(frozen=True, eq=False)
class ReductionProblem:
    """Reduce n channels to m. Knows no network.

    Attributes:
        features: (n, d) float64, one row per channel: producer rows and consumer columns, norms folded into them; for
            reducers that are `raw` as they are in the network.
        importance: (n,) float64, finite, larger = more important.
        size: m, with 1 <= m <= n.
        seed: for reducers that draw random numbers.
        biases: (n, k) float64, what is added to the channels.
        moments: what the consumers read of the channels, where that is known; only for reducers with `needs_moments`.
        linear: whether any invertible matrix may be put between producers and readers, see `ChannelGroup.linear`.
        rotation: how they may be rotated, see `ChannelGroup.rotation`; only for reducers that say that they do.
    """

    features: Tensor
    importance: Tensor
    size: int
    seed: Seed = 0
    biases: Tensor | None = None
    moments: Moments | None = None
    linear: bool = False
    rotation: Rotation | None = None

    __repr__ = show_briefly


@checked
@dataclass(frozen=True, eq=False)
class ReductionMap:
    """Two small matrices that reduce a group, float64.

    merge (m, n): producers W <- merge W; unmerge (n, m): consumers W <- W unmerge; shift (n,): what each old channel is
    on top of unmerge times the new ones, so consumers b <- b + W shift; scale (2,): numbers that merge and unmerge are
    multiplied by on top, against a factor that the forward derives from the number of channels.
    """

    merge: Tensor
    unmerge: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None

    __repr__ = show_briefly

    @cached_property
    def picked(self) -> Tensor | None:
        """Which old channel each new one is (m,), where merge only picks; looked for once, not by every member."""
        return find_picks(self.merge)

    @cached_property
    def read(self) -> Tensor | None:
        """The same of unmerge transposed: which column each reader keeps."""
        return find_picks(self.unmerge.T)


def find_picks(matrix: Tensor) -> Tensor | None:
    """Which row each row of matrix @ rows is, for a matrix that only picks rows."""
    if int(matrix.count_nonzero()) != len(matrix):
        return None
    largest, chosen = matrix.max(1)
    return chosen if bool((largest == 1).all()) else None


@runtime_checkable
class Reducer(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters. What it may say beside `mixes`: see `ReducerTraits`.

    A reducer that only selects also works on groups whose channels must not be mixed; one that mixes may have a method
    `selecting()`, see `Selecting`.
    """

    @property
    def mixes(self) -> bool: ...

    def __call__(self, problem: ReductionProblem) -> ReductionMap: ...


@runtime_checkable
class Selecting(Protocol):
    """A reducer with a form of its own for groups whose channels must not be mixed; others are selected there."""

    def selecting(self) -> Reducer: ...


@dataclass(frozen=True)
class ReducerTraits(Traits):
    """What a reducer says of itself, in attributes of these names.

    Attributes:
        mixes: whether a new channel may combine several old ones.
        needs_moments: whether it looks at `ReductionProblem.moments`.
        absorbs_duplicates: a promise: merging exact duplicates changes nothing.
        rotates: whether it rotates groups that allow it, see `ReductionProblem.rotation`.
        random: whether its answer belongs to the channels' numbers, not to what they are.
        raw, balanced: how channels are to be described to it, see `importance.features.describing_rows`.
    """

    mixes: bool
    needs_moments: bool = False
    absorbs_duplicates: bool = False
    rotates: bool = False
    random: bool = False
    raw: bool = False
    balanced: bool = False

    __repr__ = show_briefly
