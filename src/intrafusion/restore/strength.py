"""How far a layer is changed, chosen on images that it is not solved on: not, by a constant, or by a ridge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.network.gram import multiply_by_group
from intrafusion.network.layers import Layer
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.restore.activation import Activation
from intrafusion.restore.grouped_ridge import GroupedRidge
from intrafusion.restore.ridge import Ridge

STRENGTHS = (1e-3, 3e-2, 1.0, math.inf)
"""Of the ridges that are tried, from one that only conditions to one that leaves nothing but a constant."""

Change = tuple[Tensor, Tensor]
"""What is added to a layer's weight, (c, d), and as a constant to its output before the norm, (c,); float64."""

_SHARE, _FEWEST = 5, 5  # one image in five is left out; none where that is less than five
_CLEARLY = 2.0  # standard errors, by which what changes a layer less has to be better


@dataclass(frozen=True, eq=False)
class Task:
    """A layer that is to be solved, and what is known of it at k places, a row for each.

    Attributes:
        given: what its norm, or the sum that it enters, is as the layer is (k, c).
        target: what that should be (k, c).
        activation: the function that alone reads that; None where something else does.
        wanted: what that function should give (k, c); without one, the target.
        weights: how much each row counts, (k, 1) of mean 1; None for all alike.
    """

    layer: Layer
    given: Tensor
    target: Tensor
    activation: Activation | None
    wanted: Tensor
    weights: Tensor | None

    __repr__ = show_briefly

    def take(self, rows: Tensor) -> Task:
        """Some of the rows, (k,) of True and False."""
        weights = None if self.weights is None else weigh_evenly(self.weights[rows][:, 0])
        return replace(
            self, given=self.given[rows], target=self.target[rows], wanted=self.wanted[rows], weights=weights
        )

    def ridge(self, inputs: Tensor, strength: float, scarcity: float) -> Ridge:
        """Of these rows of what the layer reads (k, d), or (g, k, d) with groups, columns as in `Layer.matrix`."""
        intercept, fit = self.layer.takes_constant, Ridge if self.layer.groups == 1 else GroupedRidge
        return fit(inputs, strength, scarcity=scarcity, intercept=intercept, weights=self.weights)

    def solve(self, ridge: Ridge, steps: int) -> Change:
        return ridge.solve(self.lacking, 0 if self.activation is None else steps)

    def lacking(self, change: Tensor | None) -> Tensor:
        """What the layer lacks before its norm (k, c), with or without such a change; a `Lacking`.

        With one, that is what its activation function lacks.
        """
        if change is None or self.activation is None:
            return self.layer.before_norm(self.target - self.given)
        given = self.activation(self.given + self.layer.after_norm(change))
        return self.layer.before_norm((self.wanted - given) / self.activation.slope)

    def measure(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        """The squared error of what comes out in each image (n, 2): of its k rows, summed, and k times of their mean.

        Zero for images without rows; float64.

        Args:
            images: which each row is of, (k,) int64.
            change: what the layer gives more before its norm, (k, c).
        """
        given = self.given if change is None else self.given + self.layer.after_norm(change)
        error = (self.wanted - (given if self.activation is None else self.activation(given))).double()
        weights = error.new_ones(len(error), 1) if self.weights is None else self.weights.to(error)
        add = lambda rows: rows.new_zeros(int(images.max()) + 1, rows.shape[1]).index_add_(0, images, rows)  # noqa: E731
        total, summed, squared = (add(rows) for rows in (weights, weights * error, weights * error.square()))
        return torch.stack([squared.sum(1), (summed.square() / total.clamp(min=1e-300)).sum(1)], 1)


def choose_strength(
    task: Task, inputs: Tensor, ridge: Ridge, apart: Tensor, images: Tensor, steps: int
) -> float | None:
    r"""The strength that leaves little error on images that were not solved on; None for no change at all.

    Tried are, for the rows S of the images that are not left out, one strength after another from the least,

        D, e = argmin  mean_S || R - D x - e ||^2 + lam ||D||^2,

    an infinite one for D = 0, and at last no change. Behind an activation function R is what the steps with the
    strength of `ridge`, on S, end with. Each takes the place of the one before where it is clearly better, if over the
    images left out errors become less by d_i with

        sum d_i  >  2 sqrt(sum d_i^2),

    two standard errors (so fewer than five images never tell), both for the squared errors of all rows of an image and
    for that of their mean. Errors are those of what comes out, behind the activation function where only that reads the
    layer. What stays closer to the reduced weights is flattered, as these were chosen, and fitted, on all images: by
    one part in their number, where the standard error shrinks as one in its root. And what a ridge leaves undone is
    alike at all places, where what a fit makes of chance averages out over them and over layers, as the means tell.
    Nothing is multiplied again that the regression on all rows knows.

    Args:
        inputs: rows that the layer reads, (k, d), or (g, k, d) with groups.
        ridge: the regression on all of them.
        apart: which rows are left out, (k,) of True and False, those of whole images.
        images: which each row is of, (k,) int64.
    Reference: a ridge chosen by rows that it was not fitted to: Golub, Heath and Wahba 1979; by the working response of
        a function behind it: O'Sullivan, Yandell and Raynor 1986; a choice that only what is clear overrules: the rule
        of standard errors of Breiman, Friedman, Olshen and Stone 1984, here towards the fit and not away from it, OURS.
    """
    seen, unseen, rows, images = task.take(~apart), task.take(apart), inputs[..., apart, :], images[apart]
    nothing = unseen.measure(images)
    if not bool(nothing.any()):
        return None
    if not bool(nothing.isfinite().all()):
        return ridge.strength  # whose solution is told to be none
    part = ridge.without(apart)  # a response that all rows had a part in would tell S what the others are like
    response = part.respond(seen.lacking, 0 if task.activation is None else steps)
    strengths = [strength for strength in STRENGTHS if ridge.intercept or not math.isinf(strength)]
    errors = dict[float | None, Tensor]()
    for strength, change in zip(strengths, part.fit_each(response, strengths), strict=True):
        matrix, constant = (t.to(task.given) for t in change)
        errors[strength] = unseen.measure(images, multiply_by_group(rows.to(matrix), matrix) + constant)
    return _pick({**errors, None: nothing})


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
