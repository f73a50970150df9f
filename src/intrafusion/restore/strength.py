"""How far a layer is changed, chosen on images that it is not solved on: not, by a constant, or by a ridge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.network.layers import Layer
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.restore.activation import Activation
from intrafusion.restore.grouped_ridge import GroupedRidge
from intrafusion.restore.ridge import Change, Ridge, Rows
from intrafusion.restore.row_ridge import set_up_ridge

STRENGTHS = (1e-3, 3e-2, 1.0, math.inf)
"""Of the ridges that are tried, from one that only conditions to one that leaves nothing but a constant."""

ROWS = 1024
"""That are worked on at a time, so that nothing else as large as all of them is made."""

_SHARE, _FEWEST = 5, 5  # one image in five is left out; none where that is less than five
_CLEARLY = 2.0  # standard errors, by which what changes a layer less has to be better


@dataclass(frozen=True, eq=False)
class Task:
    """A layer that is to be solved, and what is known of it at k places, a row for each.

    Attributes:
        given: what its norm, or the sum that it enters, is as the layer is (k, c).
        target: what that should be (k, c).
        activation: the function that alone reads that; None where something else does.
        wanted: what that function should give (k, c); None: what it makes of the target or, without one, the target.
        weights: how much each row counts, (k, 1) of mean 1; None for all alike.
    """

    layer: Layer
    given: Tensor
    target: Tensor
    activation: Activation | None
    wanted: Tensor | None
    weights: Tensor | None

    __repr__ = show_briefly

    def take(self, rows: Tensor) -> Task:
        """Some of the rows, (k,) of True and False."""
        weights = None if self.weights is None else weigh_evenly(self.weights[rows][:, 0])
        given, target = self.given[rows], self.target[rows]
        return replace(self, given=given, target=target, wanted=self.want(rows), weights=weights)

    def ridge(self, inputs: Tensor, strength: float, scarcity: float) -> Ridge:
        """Of these rows of what the layer reads (k, d), or (g, k, d) with groups, columns as in `Layer.matrix`."""
        fit = set_up_ridge if self.layer.groups == 1 else GroupedRidge
        return fit(inputs, strength, scarcity=scarcity, intercept=self.layer.takes_constant, weights=self.weights)

    def lacking(self, change: Tensor | None, rows: Rows) -> Tensor:
        """What the layer lacks before its norm at some rows (r, c), with or without such a change; a `Lacking`.

        With one, that is what its activation function lacks.
        """
        gain, inverse = self.gains
        if change is None or self.activation is None:
            return (self.target[rows] - self.given[rows]).mul_(inverse)
        given = self.activation(torch.addcmul(self.given[rows], change, gain))
        return (self.want(rows) - given).mul_(inverse / self.activation.slope)

    def find_error(self, rows: slice, change: Tensor | None) -> Tensor:
        """What is wanted of what comes out at some rows (r, c), with or without such a change before the norm."""
        given = self.given[rows] if change is None else torch.addcmul(self.given[rows], change, self.gains[0])
        return self.want(rows) - (given if self.activation is None else self.activation(given))

    def want(self, rows: Rows) -> Tensor:
        """What should come out at some rows, (r, c)."""
        if self.wanted is not None:
            return self.wanted[rows]
        return self.target[rows] if self.activation is None else self.activation(self.target[rows])

    @cached_property
    def gains(self) -> tuple[Tensor, Tensor]:
        """What the norm makes of a change of 1, and what makes a change of 1 behind it, (1, c)."""
        unit = self.given.new_ones(1, self.given.shape[1])
        return self.layer.after_norm(unit), self.layer.before_norm(unit)

    def measure(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        """The squared error of what comes out in each image (n, 2): of its k rows, summed, and k times of their mean.

        Zero for images without rows; float64.

        Args:
            images: which each row is of, (k,) int64.
            change: what the layer gives more before its norm, (k, c).
        """
        count, own = int(images.max()) + 1, self.given.new_zeros(0, dtype=torch.float64)
        total, summed, squared = (own.new_zeros(count, size) for size in (1, self.given.shape[1], self.given.shape[1]))
        for start in range(0, len(images), ROWS):
            part = slice(start, start + ROWS)
            error = self.find_error(part, None if change is None else change[part]).double()
            weights = error.new_ones(len(error), 1) if self.weights is None else self.weights[part].to(error)
            total.index_add_(0, images[part], weights)
            summed.index_add_(0, images[part], weights * error)
            squared.index_add_(0, images[part], weights * error.square())
        return torch.stack([squared.sum(1), (summed.square() / total.clamp(min=1e-300)).sum(1)], 1)


def choose_strength(
    task: Task, ridge: Ridge, apart: Tensor, images: Tensor, steps: int
) -> tuple[float, Change | None] | None:
    r"""The strength that leaves little error on images that were not solved on, and the change; None for none at all.

    Tried are, for the rows S of the images that are not left out, one strength after another from the least,

        D, e = argmin  mean_S || R - D x - e ||^2 + lam ||D||^2,

    an infinite one for D = 0, and at last no change; a ridge that is larger than one that was worse than the one before
    it is left out. Behind an activation function R is what the steps with the strength of `ridge`, on S, end with. Each
    takes the place of the one before where it is clearly better, if over the images left out errors become less by d_i
    with

        sum d_i  >  2 sqrt(sum d_i^2),

    two standard errors (so fewer than five images never tell), both for the squared errors of all rows of an image and
    for that of their mean. Errors are those of what comes out, behind the activation function where only that reads the
    layer. What stays closer to the reduced weights is flattered, as these were chosen, and fitted, on all images: by
    one part in their number, where the standard error shrinks as one in its root. And what a ridge leaves undone is
    alike at all places, where what a fit makes of chance averages out over them and over layers, as the means tell.
    Nothing is multiplied again that the regression on all rows knows.

    Args:
        ridge: the regression on all rows.
        apart: which rows are left out, (k,) of True and False, those of whole images.
        images: which each row is of, (k,) int64.
    Reference: a ridge chosen by rows that it was not fitted to: Golub, Heath and Wahba 1979; by the working response of
        a function behind it: O'Sullivan, Yandell and Raynor 1986; a choice that only what is clear overrules: the rule
        of standard errors of Breiman, Friedman, Olshen and Stone 1984, here towards the fit and not away from it, OURS.
    """
    unseen, left = task.take(apart), apart.nonzero()[:, 0]
    images = images[left]
    nothing = unseen.measure(images)
    if not bool(nothing.any()):
        return None
    if not bool(nothing.isfinite().all()):
        return ridge.strength, None  # whose solution is told to be none
    part = ridge.without(apart)  # a response that all rows had a part in would tell S what the others are like
    told = part.respond(task.lacking, 0 if task.activation is None else steps)
    errors, changes = dict[float | None, Tensor](), dict[float | None, Change]()
    for strength in STRENGTHS:
        if (math.isinf(strength) and not ridge.intercept) or (not math.isinf(strength) and _is_rising(errors)):
            continue
        damped = part.with_strength(strength)
        changes[strength] = damped.fit(told)
        damped.factor = None  # as large as what it is of
        errors[strength] = unseen.measure(images, ridge.predict(changes[strength], left).to(task.given))
    picked = _pick({**errors, None: nothing})
    return None if picked is None else (picked, changes[picked])


def _is_rising(errors: Mapping[float | None, Tensor]) -> bool:
    """Whether the last one is larger than the one before."""
    last = list(errors.values())[-2:]
    return len(last) == 2 and bool((last[1] - last[0])[:, 0].sum() > 0)


def _pick(errors: Mapping[float | None, Tensor]) -> float | None:
    """The first one, or what is clearly better than what was picked before it; by errors (n, 2), see `measure`."""
    (picked, least), *rest = errors.items()
    for strength, error in rest:
        gain = least - error
        if bool((gain.sum(0) > _CLEARLY * gain.norm(dim=0)).all()):
            picked, least = strength, error
    return picked


def leave_out(count: int) -> Tensor:
    """Which of so many images are left out while strengths are chosen, (count,) of True and False; none of a few.

    In both halves the same, so that an image and its mirror image stay together where the second half are those of the
    first.

    >>> leave_out(30).nonzero()[:, 0].tolist(), int(leave_out(250).sum()), int(leave_out(24).sum())
    ([2, 7, 12, 17, 22, 27], 50, 0)
    """
    apart = torch.arange(count) % max(1, count // 2) % _SHARE == _SHARE // 2
    return apart & (apart.sum() >= _FEWEST)
