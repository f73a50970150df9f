"""Recalibrated batch norms: against statistics computed by hand, in batches of any size, touching nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import ChannelGraph, ModelError, Recipe
from intrafusion.network.batches import rebatch
from intrafusion.restore import Reestimate


class Net(nn.Module):
    """Two norms, dropout between them, and a norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=0.3), nn.Dropout(0.5)
        self.second, self.norm2 = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.idle, self.forgetful = nn.BatchNorm2d(5), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm1(self.first(x)))).mean((2, 3))
        return self.forgetful(self.norm2(self.second(x)))


def made() -> Net:
    return randomise_(Net()).eval()  # type: ignore[return-value]


def images(n: int = 40) -> Tensor:
    return 2 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 1


def restore(model: nn.Module, given: object, **options: int) -> None:
    Reestimate(**options)(SimpleNamespace(model=model, plan=None, inputs=None), model, ChannelGraph(()), given)  # type: ignore[arg-type]


def test_statistics_are_those_of_the_inputs() -> None:
    model, x = made(), images()
    restore(model, x)
    with torch.no_grad():
        u = model.first(x)
        torch.testing.assert_close(model.norm1.running_mean, u.mean((0, 2, 3)))
        torch.testing.assert_close(model.norm1.running_var, u.var((0, 2, 3)))
        batch = (u - u.mean((0, 2, 3), keepdim=True)) / (u.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        h = batch * model.norm1.weight[:, None, None] + model.norm1.bias[:, None, None]
        v = model.second(torch.relu(h).mean((2, 3)))  # no dropout
        torch.testing.assert_close(model.norm2.running_mean, v.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.norm2.running_var, v.var(0), atol=1e-5, rtol=1e-4)


class Reader(nn.Module):
    """Reads sequences; its norm sees padded positions too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(20, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.flat = nn.BatchNorm1d(2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.table(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.flat(self.head(x).flatten(0, 1)).reshape(*input_ids.shape, 2)


def test_padded_positions_count_nowhere() -> None:
    """Nor does it matter what stands there, how long it is, or in which batches the sequences come."""
    model = randomise_(Reader()).eval()
    lengths = [2, 7, 4, 7, 3, 6, 5, 2]
    texts = [torch.randint(20, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]

    def pad(some: list[Tensor], token: int, more: int) -> dict[str, Tensor]:
        length = max(map(len, some)) + more
        ids = torch.stack([torch.cat([t, torch.full((length - len(t),), token)]) for t in some])
        return {"input_ids": ids, "attention_mask": torch.stack([torch.arange(length) < len(t) for t in some]).long()}

    assert isinstance(model, Reader)
    rows = model.table(torch.cat(texts)).detach()
    for given in (pad(texts, 0, 0), pad(texts, 19, 4), [pad(texts[:3], 1, 0), pad(texts[3:], 2, 3)]):
        found = copy.deepcopy(model)
        restore(found, given)
        torch.testing.assert_close(found.norm.running_mean, rows.mean(0))
        if isinstance(given, list):
            shares = torch.tensor([13.0, 23.0]) / 36
            parts = torch.stack([rows[:13].var(0), rows[13:].var(0)])
            torch.testing.assert_close(found.norm.running_var, shares @ parts)
            continue
        torch.testing.assert_close(found.norm.running_var, rows.var(0))
        normal = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
        read = model.head(normal * model.norm.weight + model.norm.bias).detach()
        torch.testing.assert_close(found.flat.running_mean, read.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.flat.running_var, read.var(0), atol=1e-5, rtol=1e-4)


def test_batches_weigh_as_many_images_as_they_have() -> None:
    """The mean of the first norm's inputs does not depend on how the images are cut."""
    x, found = images(41), []
    batches = [x[:1], x[1:20], x[20:23], x[23:]]
    for given, size in (
        (x, 64),
        (x, 10),
        (batches, 2),
        (iter(batches), 16),
        ([(b, torch.zeros(len(b))) for b in batches], 8),
    ):
        model = made()
        restore(model, given, batch=size)
        found.append(model.norm1.running_mean)
    for mean in found[1:]:
        torch.testing.assert_close(mean, found[0])


@pytest.mark.parametrize(
    ("sizes", "limit"), [([40], 16), ([1] * 9, 4), ([3, 50, 1], 7), ([2], 9), ([17], 16), ([1], 4)]
)
def test_rebatched(sizes: list[int], limit: int) -> None:
    x = torch.arange(float(sum(sizes)))[:, None]
    calls = list(rebatch(iter(x.split(sizes)), limit))
    counts = [len(call.args[0]) for call in calls]
    assert torch.equal(torch.cat([call.args[0] for call in calls]), x)
    assert max(counts) <= limit + 1
    assert min(counts) > 1 or sum(sizes) == 1


def test_one_batch_is_held_at_a_time() -> None:
    alive: list[int] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(6):
            alive.append(1)
            yield torch.zeros(4, 1)

    seen = [len(alive) for _ in rebatch(stream(), 4)]
    assert seen == [2, 3, 4, 5, 6, 6]


def test_dicts_are_cut_and_joined() -> None:
    batches = [{"x": torch.arange(3.0)[:, None], "scale": 2.0}, {"x": torch.arange(3.0, 8)[:, None], "scale": 2.0}]
    calls = [dict(call.kwargs or {}) for call in rebatch(batches, 4)]
    assert torch.equal(torch.cat([c["x"] for c in calls]), torch.arange(8.0)[:, None])
    assert {c["scale"] for c in calls} == {2.0}


def test_everything_else_is_left_as_it_was() -> None:
    model = made()
    model.train()
    model.norm2.eval()
    model.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    restore(model, images())
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"norm1.running_mean", "norm1.running_var", "norm2.running_mean", "norm2.running_var"}
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.norm1.momentum, model.norm2.momentum) == (0.3, 0.1)
    assert (model.training, model.norm1.training, model.norm2.training, model.drop.training) == (
        True,
        True,
        False,
        True,
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_broken_statistics_are_forgotten() -> None:
    model, x = made(), images()
    model.norm1.running_mean.fill_(float("nan"))  # type: ignore[union-attr]
    restore(model, x)
    torch.testing.assert_close(model.norm1.running_mean, model.first(x).mean((0, 2, 3)).detach())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images() * float("nan"), "norm1: its inputs are NaN"),
        ([], "got none"),
        (torch.zeros(4, 2, 8, 8), "does not run"),
    ],
)
def test_an_error_changes_nothing(given: object, message: str) -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=message):
        restore(model, given)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: expected at least 2 images"):
        Reestimate(batch=1)


def test_a_pruned_real_network_profits(data_dir: Path) -> None:
    from intrafusion.lab import zoo
    from intrafusion.measure.accuracy import accuracy

    name = "cifar10_resnet20"
    model, example, test = zoo.build(name, pretrained=True), zoo.example_input(name), zoo.load_data(name, "test", 250)
    graph = intrafusion.inspect(model, example)
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.8, reducer="select"))
    small = intrafusion.apply(model, plan, example, graph=graph)
    before = accuracy(small.model, test.images, test.labels)
    Reestimate()(small, model, graph, zoo.load_data(name, "train", 128).images)
    assert accuracy(small.model, test.images, test.labels) > before + 0.25
