"""FPGM: a channel near the geometric median of all channels can be replaced by the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGroup
from intrafusion.importance.aggregate import aggregate, check_aggregation
from intrafusion.importance.features import linear_rows
from intrafusion.importance.observation import choose_weights, needs_tensors


@checked
@dataclass(frozen=True)
class FPGM:
    r"""s_c = sum over c' of || w_c - w_c' ||_p, per member, then over the members.

    Members are producer rows, consumer columns and depthwise kernels. The paper looks at the filters alone, as they
    are: reduction="first", the default. (Torch-Pruning's FPGMImportance takes distances between squared entries over
    all members; this does not.)

    Attributes:
        p: order of the distance, > 0.
        reduction: over the members: "mean", "sum", "max", "prod", "first" or "last".
        normalizer: over the channels, see `aggregate`.
        member_normalizer: over the channels of each member before they are reduced, by the same names.
        folded: whether norms are folded into the weights, or they are compared as they are in the network.

    Reference: He et al. 2019 (filter pruning via geometric median).
    """

    p: float = 2.0
    reduction: str = "first"
    normalizer: str | None = "mean"
    member_normalizer: str | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise RecipeError(f"p: expected p > 0, got {self.p}.")
        check_aggregation(self.reduction, self.normalizer, self.member_normalizer)

    @property
    def needs(self) -> frozenset[str]:
        return needs_tensors(self.folded)

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        rows = linear_rows(group, choose_weights(self, group, weights, observations, folded=self.folded))
        if not rows:
            raise ModelError(f"group {group.name!r}: no weight to compare its channels by; exclude the group.")
        scores = torch.stack([_sum_distances(r, self.p) for r in rows])
        return aggregate(scores, self.reduction, self.normalizer, self.member_normalizer)


def _sum_distances(rows: Tensor, p: float = 2.0) -> Tensor:
    """Sum over j of ||x_i - x_j||_p for each row (n, d) -> (n,)."""
    return torch.cdist(rows, rows, p=p, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
