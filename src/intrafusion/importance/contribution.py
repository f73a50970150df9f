"""Relative contribution: a channel matters as much as its share of what its readers add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.graph import ChannelGroup
from intrafusion.importance.aggregate import aggregate, check_aggregation
from intrafusion.importance.observation import get_observed


@checked
@dataclass(frozen=True)
class RelativeContribution:
    r"""s_c = sum over the outgoing weights w_kc of E |w_kc x_c| / sum_j |w_kj x_j|, per reader, then over the readers.

    The mean is over unlabelled images and over the places of a feature map.

    Attributes:
        reduction: over the readers: "sum", "mean", "max", "prod", "first" or "last".
        normalizer: over the channels, see `aggregate`.
        member_normalizer: over the channels of each reader before they are reduced, by the same names.

    Reference: Hussien et al. 2024; the bounded form (they divide by the sum itself, which explodes near 0) is OURS.
    """

    reduction: str = "sum"
    normalizer: str | None = "mean"
    member_normalizer: str | None = None

    needs = frozenset({"contributions"})  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        check_aggregation(self.reduction, self.normalizer, self.member_normalizer)

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        shares = get_observed(observations, "contributions", self, group)
        return aggregate(shares, self.reduction, self.normalizer, self.member_normalizer)
