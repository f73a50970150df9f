"""Training goes on after the weights became smaller in place, with what the optimizer remembers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from breadth import spread
from torch import Tensor, nn

from intrafusion import compress
from intrafusion.surgery.optimizers import find_optimizers

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    def loss() -> Any:
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    optimizer.step(loss)


@pytest.mark.parametrize(("name", "reducer"), spread([*OPTIMIZERS], ["select", "intrafusion"]))
def test_every_optimizer_goes_on(name: str, reducer: str) -> None:
    model, x = network(), torch.randn(16, 8)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer, x)
    small = compress(model, x, 0.5, reducer=reducer, inplace=True)
    assert any(f"the optimizer {name} of this network goes on" in note for note in small.notes)
    assert any("starts anew" in note for note in small.notes) == (name in ("Adafactor", "LBFGS"))
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step(model, optimizer, x)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_selected_channels_keep_what_is_remembered_of_them() -> None:
    model, x = network(), torch.randn(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    step(model, optimizer, x)
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    weight = model[0].weight.detach().clone()
    compress(model, x, 0.5, reducer="select", importance="l2", restore=None, inplace=True)
    rows = [next(i for i in range(32) if torch.equal(weight[i], row)) for row in model[0].weight.detach()]
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            old, new = before[name][key], optimizer.state[parameter][key]
            expected = old[:, rows] if name == "3.weight" else old if name == "3.bias" else old[rows]
            assert torch.equal(new, expected), (name, key)
        assert optimizer.state[parameter]["step"] == before[name]["step"]


def test_merged_channels_move_as_their_weights_do() -> None:
    """A momentum V becomes M V, second moments stay nothing negative."""
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    step(model, optimizer, x)
    momentum = optimizer.state[model[0].weight]["exp_avg"].double()
    small = compress(model, x, 0.5, reducer="intrafusion", restore=None, inplace=True)
    merge = small.plan.maps["0"].merge
    expected = (merge @ momentum).float()
    assert torch.allclose(optimizer.state[model[0].weight]["exp_avg"], expected, atol=1e-7)
    assert bool((optimizer.state[model[0].weight]["exp_avg_sq"] >= 0).all())


def test_only_optimizers_of_the_network_are_touched() -> None:
    model, other = network(), network()
    mine, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    assert find_optimizers(model) == [mine]
    assert find_optimizers(other) == [theirs]
    assert not any("optimizer" in note for note in compress(model, torch.randn(4, 8), 0.5).notes)


@pytest.mark.parametrize("held", ["nothing", "an old loss", "a hook on gradients", "a hook on the parameter"])
def test_the_next_backward_works_whatever_is_still_held(held: str) -> None:
    model, x, seen = network(), torch.randn(4, 8), []
    loss = model(x).sum() if held == "an old loss" else None
    for parameter in model.parameters() if "hook" in held else []:
        if held == "a hook on gradients":
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape == p.shape))
        else:
            parameter.register_hook(lambda g: seen.append(True))
    compress(model, x, 0.5, restore=None, inplace=True)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert seen == [True] * (6 if "hook" in held else 0)
    assert loss is None or loss.requires_grad
