"""Taylor: a channel matters as much as the loss would change without its weights, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGroup, Role
from intrafusion.importance.aggregate import aggregate, check_aggregation
from intrafusion.importance.features import channel_rows, weighs
from intrafusion.importance.observation import get_observed


@checked
@dataclass(frozen=True)
class Taylor:
    r"""s_c = sum over the entries w of channel c of |w dL/dw|, per member, then over the members.

    L is the loss on labels where the images come with labels, else half the mean squared output (see `observe`); its
    gradient is the mean over all images. Members are producer rows, consumer columns and depthwise kernels of the
    network as it is: w dL/dw is the same with norms folded. A product that is not finite counts as 0, and so does a
    weight that the loss does not depend on: scores are never NaN.

    Attributes:
        multivariable: | sum of w dL/dw | instead: the change if the entries of a member vanish together.
        reduction: over the members: "mean", "sum", "max", "prod", "first" or "last".
        normalizer: over the channels, see `aggregate`.
        member_normalizer: over the channels of each member before they are reduced, by the same names.
        bias: whether biases are members too.

    Reference: Molchanov et al. 2019 (first order); per channel as Torch-Pruning's TaylorImportance.
    """

    multivariable: bool = False
    reduction: str = "mean"
    normalizer: str | None = "mean"
    bias: bool = False
    member_normalizer: str | None = None

    needs = frozenset({"tensors", "gradients"})  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        check_aggregation(self.reduction, self.normalizer, self.member_normalizer)

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        tensors = get_observed(observations, "tensors", self, group)
        gradients = get_observed(observations, "gradients", self, group)
        scores = [
            _first_order(channel_rows(tensors, m), channel_rows(gradients, m), self.multivariable)
            for m in group.members
            if m.tensor in gradients and (weighs(m, tensors) or (self.bias and Role.SHIFTS in m.roles))
        ]
        if not scores:
            raise ModelError(f"group {group.name!r}: no parameter weighs its channels; exclude the group.")
        return aggregate(torch.stack(scores), self.reduction, self.normalizer, self.member_normalizer)


def _first_order(rows: Tensor, gradients: Tensor, multivariable: bool = False) -> Tensor:
    """sum_j |x_ij g_ij| of each row, or |sum_j x_ij g_ij|; products that are not finite count as 0."""
    products = rows * gradients
    products = torch.where(products.isfinite(), products, 0.0)
    return products.sum(dim=1).abs() if multivariable else products.abs().sum(dim=1)
