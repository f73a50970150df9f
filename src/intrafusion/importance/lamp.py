"""LAMP: magnitude relative to everything at least as large, comparable between layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.graph import ChannelGroup
from intrafusion.importance.magnitude import Magnitude


@checked
@dataclass(frozen=True)
class LAMP:
    r"""s_c = w_c / sum of w_c' over all channels c' with w_c' >= w_c,  w_c = sum |entries of c|^p over the members.

    Within a group the order is that of the magnitudes; the scale makes groups comparable.

    Attributes:
        p, reduction, bias, member_normalizer, folded: as in `Magnitude`.

    Reference: Lee et al. 2021, section 3, for channels as Torch-Pruning's LAMPImportance.
    """

    p: float = 2.0
    reduction: str = "mean"
    bias: bool = False
    member_normalizer: str | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        _ = self.magnitude  # refuses what it does not take

    @property
    def magnitude(self) -> Magnitude:
        return Magnitude(self.p, self.reduction, "lamp", self.bias, self.member_normalizer, self.folded)

    @property
    def needs(self) -> frozenset[str]:
        return self.magnitude.needs

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        return self.magnitude(group, weights, observations)
