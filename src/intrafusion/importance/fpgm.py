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


@checked
@dataclass(frozen=True)
class FPGM:
    r"""s_c = sum over c' of || w_c - w_c' ||_p, per member, then over the members.

    Members are producer rows, consumer columns and depthwise kernels, norms folded. The paper looks at the producer
    alone: reduction="first". (Torch-Pruning's FPGMImportance takes distances between squared entries; this does not.)

    Attributes:
        p: order of the distance, > 0.
        reduction: over the members: "mean", "sum", "max", "prod", "first" or "last".
        normalizer: over the channels, see `aggregate`.

    Reference: He et al. 2019 (filter pruning via geometric median).
    """

    p: float = 2.0
    reduction: str = "mean"
    normalizer: str | None = "mean"

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise RecipeError(f"p: expected p > 0, got {self.p}.")
        check_aggregation(self.reduction, self.normalizer)

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        rows = linear_rows(group, weights)
        if not rows:
            raise ModelError(f"group {group.name!r}: no weight to compare its channels by; exclude the group.")
        return aggregate(torch.stack([_sum_distances(r, self.p) for r in rows]), self.reduction, self.normalizer)


def _sum_distances(rows: Tensor, p: float = 2.0) -> Tensor:
    """Sum over j of ||x_i - x_j||_p for each row (n, d) -> (n,)."""
    return torch.cdist(rows, rows, p=p, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
