"""What is computed of a network that runs in autocast is not rounded; the network is run as it runs."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.network.autocast import as_in_forward, without_autocast


class Residual(nn.Module):
    """A sum that two layers enter, a group norm, and a weight that a function multiplies by; all of it in autocast."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
        self.inner, self.back, self.bare = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Parameter(torch.randn(12, 16))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        casting = torch.autocast("cpu", torch.bfloat16) if self.casts else contextlib.nullcontext()
        with casting:
            x = F.relu(self.norm(self.stem(x)))
            x = x + self.back(F.relu(self.inner(x)))
            h = F.linear(x.mean((2, 3)), self.bare)
        return self.head(h.float().relu())


def restored(casts: bool, around: contextlib.AbstractContextManager[object], batches: bool) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    net, x = Residual(casts).eval(), torch.randn(80, 3, 8, 8)
    with around:
        small = intrafusion.compress(net, x[:2], 0.5, inputs=list(x.split(40)) if batches else x)
    (step,) = small.restored
    assert step.error_after is not None
    assert not step.undone
    return step.error_after, small.model.get_parameter("back.weight")


@pytest.mark.parametrize("batches", [False, True])
def test_layers_in_autocast_are_solved_as_well_as_others(batches: bool) -> None:
    inside, _ = restored(True, contextlib.nullcontext(), batches)
    plain, _ = restored(False, contextlib.nullcontext(), batches)
    assert inside == pytest.approx(plain, rel=0.1)


def test_autocast_around_the_call_changes_nothing() -> None:
    _, around = restored(False, torch.autocast("cpu", torch.bfloat16), True)
    _, plain = restored(False, contextlib.nullcontext(), True)
    assert torch.equal(around, plain)


def test_a_layer_that_is_run_once_more_has_its_new_weight() -> None:
    """Autocast keeps what it made of a weight."""
    layer, x = nn.Linear(3, 2, bias=False), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer(x)
        with without_autocast():
            assert layer(x).dtype == torch.float32
            layer.weight.fill_(1.0)
            with as_in_forward():
                again = layer(x)
        assert torch.is_autocast_enabled("cpu")
    assert again.dtype == torch.bfloat16
    assert again.tolist() == [[3.0, 3.0]]
