"""Singular values of layers, and the best two thinner layers for a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.surgery.lowrank import LowRank, make_low_rank


@checked
@dataclass(frozen=True, eq=False)
class Spectrum:
    """What a rank costs and keeps in one layer.

    Attributes:
        values: (groups, k) singular values of the flattened weight of each group of the layer, descending.
        outputs: output channels of each group.
        inputs: d, entries of one filter.
    """

    name: str
    values: Tensor
    outputs: int
    inputs: int

    __repr__ = show_briefly

    @property
    def groups(self) -> int:
        return len(self.values)

    @property
    def dense(self) -> int:
        """Parameters of the layer as it is, its bias left out."""
        return self.groups * self.outputs * self.inputs

    @property
    def step(self) -> int:
        """Parameters that one more rank costs."""
        return self.groups * (self.outputs + self.inputs)

    @property
    def full(self) -> int:
        return self.values.shape[1]

    @property
    def largest(self) -> int:
        """The largest rank that saves parameters, 0 if none does: r (c_out + d) < c_out d."""
        return min(self.full, (self.dense - 1) // self.step)

    @property
    def energy(self) -> Tensor:
        """(k,) sum over the groups of the squared singular values."""
        return self.values.square().sum(0)

    @checked
    def cost(self, rank: int) -> int:
        """Parameters at a rank; a rank that saves none leaves the layer as it is."""
        return rank * self.step if rank <= self.largest else self.dense


def _matrices(layer: nn.Module) -> Tensor:
    """(groups, c_out / groups, d) float64: the flattened weight of each group of a layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = int(getattr(layer, "groups", 1))
    return weight.detach().double().reshape(groups, len(weight) // groups, -1)


@checked
def spectrum(name: str, layer: nn.Module) -> Spectrum:
    flat = _matrices(layer)
    return Spectrum(name, torch.linalg.svdvals(flat), flat.shape[1], flat.shape[2])


def factorize_layer(layer: nn.Module, rank: int) -> LowRank:
    r"""The two layers whose product is nearest to a layer's weight: W = U S V^T cut to `rank`.

    reduce = S^(1/2) V^T and expand = U S^(1/2), group by group; of all pairs of this rank the one with the least
    squared error of the weight (Eckart and Young 1936).
    """
    u, s, vh = torch.linalg.svd(_matrices(layer), full_matrices=False)
    root = s[:, :rank].sqrt()
    split = make_low_rank(layer, rank)
    _write_values_(split.reduce, vh[:, :rank] * root[:, :, None])
    _write_values_(split.expand, u[:, :, :rank] * root[:, None, :])
    bias = layer.bias
    if isinstance(bias, Tensor):
        assert isinstance(split.expand.bias, Tensor)
        split.expand.bias.data.copy_(bias.detach())
    return split


def _write_values_(layer: nn.Module, values: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.data.copy_(values.reshape(weight.shape))
