"""Batch-norm scale: a channel matters as much as its norm lets through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGroup, Member, Role
from intrafusion.importance.aggregate import aggregate, check_aggregation
from intrafusion.importance.features import channel_rows
from intrafusion.importance.observation import get_observed


@checked
@dataclass(frozen=True)
class BNScale:
    """s_c = |gamma_c| of every norm that the group runs through, then over the norms.

    Batch norms where the group has any, else its other norms. Folded weights hide gamma: this reads the tensors as they
    are in the network, and needs no images.

    Attributes:
        reduction: over the norms: "mean", "sum", "max", "prod", "first" or "last".
        normalizer: over the channels, see `aggregate`.
        member_normalizer: over the channels of each norm before they are reduced, by the same names.

    Reference: Liu et al. 2017 (network slimming); aggregation as Torch-Pruning's BNScaleImportance.
    """

    reduction: str = "mean"
    normalizer: str | None = "mean"
    member_normalizer: str | None = None

    needs = frozenset({"tensors"})  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        check_aggregation(self.reduction, self.normalizer, self.member_normalizer)

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        tensors = get_observed(observations, "tensors", self, group)
        rows = [channel_rows(tensors, member) for member in _norm_scales(group, tensors)]
        if not rows:
            raise ModelError(f"group {group.name!r}: no norm scales its channels; exclude it or use another criterion.")
        scores = torch.stack([r.abs().sum(dim=1) for r in rows])
        return aggregate(scores, self.reduction, self.normalizer, self.member_normalizer)


def _norm_scales(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> list[Member]:
    """The scales of the group's batch norms; of its other norms if it has none."""
    scales = [m for m in group.with_role(Role.SCALES) if tensors[m.tensor].dim() == 1]
    batch_norms = {m.module for m in group.with_role(Role.MEAN, Role.VARIANCE)}
    return [m for m in scales if m.module in batch_norms] or scales
