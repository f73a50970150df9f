"""Magnitude: a channel matters as much as the weights it runs through are large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGroup
from intrafusion.importance.aggregate import aggregate, check_aggregation
from intrafusion.importance.features import channel_biases, linear_rows
from intrafusion.importance.observation import choose_weights, needs_tensors


@checked
@dataclass(frozen=True)
class Magnitude:
    r"""s_c = sum over the entries w of channel c of |w|^p (max |w| for p = inf), per member, then over the members.

    Members are producer rows, consumer columns and depthwise kernels.

    Attributes:
        p: order, > 0; inf takes the largest entry.
        reduction: over the members: "mean", "sum", "max", "prod", "first" or "last".
        normalizer: over the channels: "mean", "sum", "max", "standardize", "gaussian", "lamp" or None.
        bias: whether biases are one more member; all biases of a group together.
        member_normalizer: over the channels of each member before they are reduced, by the same names: members of
            another scale then weigh alike, such as blocks on a residual stream.
        folded: whether norms are folded into the weights; else the weights are those of the network as it is, and the
            scales of its norms are members too.

    Reference: Li et al. 2017; as it stands here, with norms not folded and every member as it is, it is Torch-Pruning's
    MagnitudeImportance (Fang et al. 2023). Theus et al. 2024 (Intra-Fusion) take p = 1 and fold norms first.
    """

    p: float = 1.0
    reduction: str = "mean"
    normalizer: str | None = "mean"
    bias: bool = False
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
        weights = choose_weights(self, group, weights, observations, folded=self.folded)
        rows = linear_rows(group, weights, scales=not self.folded)
        added = channel_biases(group, weights)
        if self.bias and added.shape[1] > 0:
            rows.append(added)
        if not rows:
            raise ModelError(f"group {group.name!r}: no weight to measure the magnitude of; exclude the group.")
        scores = torch.stack([_magnitude(r, self.p) for r in rows])
        return aggregate(scores, self.reduction, self.normalizer, self.member_normalizer)


def _magnitude(rows: Tensor, p: float) -> Tensor:
    """sum_j |x_ij|^p of each row, or max_j |x_ij| for p = inf."""
    return rows.abs().amax(dim=1) if math.isinf(p) else rows.abs().pow(p).sum(dim=1)
