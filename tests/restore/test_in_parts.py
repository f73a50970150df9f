"""Layers solved on many batches are those of one batch, and those of ridge regression by an explicit design."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.tensors import copy_model
from intrafusion.restore import LeastSquares

STRENGTH, SCARCITY = 0.05, 2.0
RIDGE = LeastSquares(strength=STRENGTH, scarcity=SCARCITY, steps=0).solver
COUNT = 13
CUTS = [[13], [5, 5, 3], [4, 4, 4, 1], [2, 7, 3, 1], [1] * 13]
KINDS = {
    "linear": nn.Linear(4, 6),
    "linear without bias": nn.Linear(4, 6, bias=False),
    "conv": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, bias=False),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "multiplied": nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
}


class Behind(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.flat = layer, isinstance(layer, nn.Linear)
        self.stem = nn.Linear(3, 4) if self.flat else nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stem(x).relu()).tanh()


def list_columns(layer: Any, x: Tensor) -> Tensor:
    """What each entry of the weights of an output is multiplied with, (outputs, places, entries)."""
    probe = copy_model(layer).double()
    probe.bias, weight, columns = None, probe.weight.data, []
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    own = weight.unflatten(0, (groups, -1)) if transposed else weight[None]
    taps = itertools.product(*map(range, getattr(layer, "kernel_size", ())))
    for tap, i in itertools.product(taps, range(own.shape[1 if transposed else 2])):
        weight.zero_()
        own.select(1 if transposed else 2, i)[..., *tap] = 1.0
        out = probe(x)
        columns.append(out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1))
    return torch.stack(columns, 2)


def find_ridge(x: Tensor, lacking: Tensor, weights: Tensor, constant: bool) -> Tensor:
    """What the ridge gives, (outputs, places), of float64 columns (outputs, places, entries)."""
    share = weights / weights.sum()
    mean = (share[:, None] * x).sum(1, keepdim=True) if constant else torch.zeros_like(x[:, :1])
    about = (share * lacking).sum(1, keepdim=True) if constant else torch.zeros_like(lacking[:, :1])
    x, lacking = x - mean, lacking - about
    products = torch.einsum("p,opi,opj->oij", share, x, x)
    rows = float(weights.sum() ** 2 / weights.square().sum())
    size = products.diagonal(dim1=1, dim2=2).mean(1)
    ridge = (STRENGTH + SCARCITY * x.shape[2] / rows) * size
    products = products + ridge[:, None, None] * torch.eye(x.shape[2], dtype=x.dtype)
    change = torch.linalg.solve(products, torch.einsum("p,opi,op->oi", share, x, lacking))
    return torch.einsum("opi,oi->op", x, change) + about


@pytest.mark.parametrize("weighed", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_ridge_of_all_rows_however_they_are_cut(kind: str, weighed: bool) -> None:
    torch.manual_seed(0)
    model = randomise_(Behind(copy_model(KINDS[kind]))).eval()
    x = torch.randn(COUNT, 5, 3) if model.flat else torch.randn(COUNT, 3, 6, 7)
    graph = intrafusion.inspect(model, x[:1])
    spoilt = copy_model(model)
    spoilt.stem.weight.data.add_(0.3 * torch.randn_like(spoilt.stem.weight))
    spoilt.layer.weight.data.add_(0.3 * torch.randn_like(spoilt.layer.weight))
    counts = torch.rand(COUNT, 1, dtype=torch.float64) + 0.2 if weighed else torch.ones(COUNT, 1, dtype=torch.float64)
    original, other = (copy_model(m).double() for m in (model, spoilt))
    per_output = lambda t: t.movedim(-1 if model.flat else 1, 0).flatten(1)  # noqa: E731
    with torch.no_grad():
        read = other.stem(x.double()).relu()
        before = per_output(other.layer(read))
        lacking = per_output(original.layer(original.stem(x.double()).relu())) - before
        weights = counts.expand(COUNT, lacking.shape[1] // COUNT).flatten()
        columns = list_columns(model.layer, read)
        expected = before + find_ridge(columns, lacking, weights, model.layer.bias is not None)
    for cut in CUTS:
        small, parts = copy_model(spoilt), x.split(cut)
        tables = counts.split(cut)
        batches = [
            Inputs((part,), weights=RowWeights((table,)) if weighed else None)
            for part, table in zip(parts, tables, strict=True)
        ]
        found = RIDGE.solve_(small, {}, model, graph, batches, left=["stem"])
        assert "layer" in found.changes, found.skipped
        with torch.no_grad():
            given = per_output(small.double().layer(read))
        torch.testing.assert_close(given, expected, atol=2e-4, rtol=2e-4, msg=lambda m: f"{cut}: {m}")  # noqa: B023
