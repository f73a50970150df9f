"""CHIP: a channel matters as much as its feature map is independent of the others'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.graph import ChannelGroup
from intrafusion.importance.aggregate import aggregate, check_aggregation
from intrafusion.importance.observation import get_observed

CHUNK = 2**22  # entries of the Gram matrices that are held at a time


@checked
@dataclass(frozen=True)
class CHIP:
    r"""s_c = || A ||_* - || A without row c ||_*, A (n, places) the channels of one image, mean over images.

    The feature maps are those that the group's first reader sees, behind the activation. Costs n eigenvalue problems of
    size min(n, places) for each of the observed images.

    Attributes:
        normalizer: over the channels, see `aggregate`.

    Reference: Sui et al. 2021 (CHIP).
    """

    normalizer: str | None = "mean"

    needs = frozenset({"feature_maps"})  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        check_aggregation("mean", self.normalizer)

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        maps = get_observed(observations, "feature_maps", self, group)
        return aggregate(channel_independence(maps)[None], "mean", self.normalizer)


def channel_independence(maps: Tensor) -> Tensor:
    """Nuclear norm that each channel adds to those of all others; (k, n, places) -> (n,) float64, mean over the k."""
    return torch.stack([_lost_nuclear_norm(image.double()) for image in maps]).mean(dim=0)


def _lost_nuclear_norm(matrix: Tensor) -> Tensor:
    """||A||_* - ||A without row i||_* for each row i of A (n, p), never negative."""
    n, p = matrix.shape
    whole = _nuclear_norm(matrix @ matrix.T if n <= p else matrix.T @ matrix)
    size = max(1, CHUNK // min(n, p) ** 2)
    without = [_nuclear_norm(_leave_out_grams(matrix, rows)) for rows in torch.arange(n).split(size)]
    return (whole - torch.cat(without)).clamp(min=0.0)


def _nuclear_norm(gram: Tensor) -> Tensor:
    """Sum of singular values of A from A A^T or A^T A, the last two dimensions."""
    return torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().sum(dim=-1)


def _leave_out_grams(matrix: Tensor, rows: Tensor) -> Tensor:
    """The smaller of A A^T and A^T A with one row of A set to zero, for each of `rows`."""
    n, p = matrix.shape
    rows = rows.to(matrix.device)
    if n <= p:
        kept = torch.ones(len(rows), n, dtype=matrix.dtype, device=matrix.device)
        kept[torch.arange(len(rows)), rows] = 0.0
        return (matrix @ matrix.T) * kept[:, :, None] * kept[:, None, :]
    return matrix.T @ matrix - matrix[rows][:, :, None] * matrix[rows][:, None, :]
