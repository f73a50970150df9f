"""LBYL against its three terms, minimised by NumPy's least squares, and against filters that are sums of others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gallery.core import chain
from torch import Tensor, nn

import intrafusion
from intrafusion import RecipeError
from intrafusion.restore import LeaveBeforeYouLeave
from intrafusion.restore.lbyl import leave_columns


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_a_filter_leaves_minimises_the_three_terms() -> None:
    filters, kept, strength = rows(7, 5), torch.tensor([0, 2, 5]), 0.3
    left = leave_columns(filters, kept, strength)
    a = filters[kept].T.numpy()
    lam = strength * np.square(a).sum(0).mean()
    for j in range(7):
        told = np.concatenate([filters[j].numpy(), np.zeros(3)])
        expected = np.linalg.lstsq(np.concatenate([a, np.sqrt(lam) * np.eye(3)]), told, rcond=None)[0]
        kept_already = (kept == j).double().numpy()
        np.testing.assert_allclose(left[j].numpy(), kept_already if kept_already.any() else expected, atol=1e-10)


def test_a_filter_that_is_a_sum_of_others_is_missed_by_nobody() -> None:
    """Linear layers with a batch norm between, and the sum where it is after the norm."""
    torch.manual_seed(0)
    model = chain(a=nn.Linear(5, 6), n=nn.BatchNorm1d(6), b=nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        model.n.weight.uniform_(0.5, 2)
        model.n.running_var.uniform_(0.5, 2)
        scale = model.n.weight / (model.n.running_var + model.n.eps).sqrt()
        for tensor in (model.a.weight, model.a.bias):
            factor = scale.reshape(-1, *[1] * (tensor.dim() - 1))
            mixed = factor * tensor
            mixed[4] = mixed[0] - 2 * mixed[1]
            tensor.copy_(mixed / factor)
        model.b.weight[:, 5] *= 1e-3
    x = torch.randn(9, 5).double()
    keep_first = lambda group, weights, observations=None: -torch.arange(group.size).double()  # noqa: E731
    small = intrafusion.compress(
        model, x, {"a": 4 / 6}, reducer="select", importance=keep_first, restore=LeaveBeforeYouLeave(strength=0)
    )
    assert small.plan.maps["a"].merge.argmax(1).tolist() == [0, 1, 2, 3]
    told = small.model.b.weight - model.b.weight[:, :4]
    share = np.linalg.lstsq(
        torch.cat([scale[:4, None] * model.a.weight[:4], (scale * model.a.bias)[:4, None]], 1).T.detach().numpy(),
        torch.cat([scale[5] * model.a.weight[5], (scale * model.a.bias)[5:6]]).detach().numpy(),
        rcond=None,
    )[0]
    expected = torch.outer(model.b.weight[:, 4], torch.tensor([1.0, -2.0, 0, 0]).double())
    expected = expected + torch.outer(model.b.weight[:, 5], torch.from_numpy(share))
    torch.testing.assert_close(told, expected.detach())


def test_merged_channels_and_errors() -> None:
    model = chain(a=nn.Linear(5, 6), r=nn.ReLU(), b=nn.Linear(6, 3)).eval()
    x = torch.randn(4, 5)
    plain = intrafusion.compress(model, x, 0.5, reducer="fold", restore=None)
    same = intrafusion.compress(model, x, 0.5, reducer="fold", restore="lbyl")
    assert torch.equal(plain.model.b.weight, same.model.b.weight), "only what was pruned is restored"
    with pytest.raises(RecipeError, match="strength: expected a number >= 0, got -1"):
        LeaveBeforeYouLeave(strength=-1)
    with pytest.raises(RecipeError, match="shift: expected a number >= 0, got -0.5"):
        LeaveBeforeYouLeave(shift=-0.5)
