"""The training loop: its first step by hand, its determinism, what it leaves alone, and that it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from intrafusion.lab import zoo
from intrafusion.lab.zoo import Images, train_
from intrafusion.measure.accuracy import accuracy


def blobs(count: int = 40) -> Images:
    """Two classes of points, far apart."""
    labels = torch.arange(count) % 2
    return Images(torch.randn(count, 3) + 6 * labels[:, None], labels)


def softmax_gradient(weight: Tensor, data: Images) -> Tensor:
    """Gradient of the mean cross-entropy of a linear classifier, in closed form."""
    error = (data.images @ weight.T).softmax(1) - torch.eye(2)[data.labels]
    return error.T @ data.images / len(data)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_first_step_is_the_one_by_hand(optimizer) -> None:
    data, model = blobs(), nn.Linear(3, 2, bias=False)
    weight = model.weight.detach().clone()
    gradient = softmax_gradient(weight, data)
    [loss] = train_(model, data, epochs=1, batch_size=40, optimizer=optimizer, lr=0.01, weight_decay=0.0)
    step = 1.9 * gradient if optimizer == "sgd" else gradient.sign()  # Nesterov momentum 0.9; Adam's first step
    torch.testing.assert_close(model.weight.detach(), weight - 0.01 * step, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(data.images @ weight.T, data.labels)), rel=1e-5)


def test_weight_decay_alone_shrinks_the_weights() -> None:
    model = nn.Linear(3, 2, bias=False)
    weight = model.weight.detach().clone()
    still = Images(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    train_(model, still, epochs=1, batch_size=4, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 1.9 * 0.5))


def test_the_learning_rate_falls_along_half_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda s: (rates.append(s.param_groups[0]["lr"]), step(s))[1])
    train_(nn.Linear(3, 2), blobs(), epochs=2, batch_size=20, lr=0.4)
    assert rates == pytest.approx([0.4, 0.2 + 0.2 * 0.5**0.5, 0.2, 0.2 - 0.2 * 0.5**0.5])


def test_the_same_seed_gives_the_same_bytes_dropout_included() -> None:
    data, start, found = blobs(), nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), []
    for seed in (5, 5, 6):
        torch.rand(1)  # what the program draws in between must not matter
        model, state = copy.deepcopy(start), torch.get_rng_state()
        train_(model, data, epochs=2, batch_size=16, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_modes_and_frozen_parameters_stay() -> None:
    first, norm, dropout, last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2)
    model = nn.Sequential(first, norm, dropout, last).eval()
    dropout.train()
    first.weight.requires_grad_(False)
    frozen, free = first.weight.clone(), last.weight.detach().clone()
    train_(model, blobs(), epochs=1, batch_size=10)
    assert [m.training for m in model] == [False, False, True, False]
    assert torch.equal(first.weight, frozen)
    assert not torch.equal(last.weight, free)
    assert norm.state_dict()["num_batches_tracked"] == 4  # it was in training mode inside


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()
    assert len(train_(model, blobs(6), epochs=3, batch_size=128)) == 3
    assert not torch.equal(model.weight, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sdg"}, r"unknown optimizer 'sdg'. Did you mean 'sgd'\?"),
        ({"epochs": 0}, "expected at least 1 each, got 40 images, epochs=0"),
        ({"batch_size": 0}, "expected at least 1 each, got 40 images, epochs=1, batch_size=0"),
    ],
)
def test_wrong_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_(nn.Linear(3, 2), blobs(), **{"epochs": 1, **options})


def test_the_digits_network_learns_the_digits_whatever_the_number_of_threads() -> None:
    data = zoo.load_data("digits", "test")
    assert accuracy(zoo.build("digits_resnet"), data.images, data.labels) < 0.3
    model = zoo.trained_digits()
    assert accuracy(model, data.images, data.labels) > 0.97
    try:
        torch.set_num_threads(2)
        again = zoo.trained_digits()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
