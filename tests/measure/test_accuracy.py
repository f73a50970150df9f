"""Accuracy: counts by hand, every kind of output, and the network left as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.measure.accuracy import accuracy

IMAGES = torch.eye(4).repeat(2, 1)
LABELS = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])  # the identity gets 0 1 2 3 0 right: 5 of 8


class Returns(nn.Module):
    """The identity on its input, returned in some wrapping."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 500])
def test_the_fraction_is_the_one_by_hand(batch_size: int) -> None:
    assert accuracy(nn.Identity(), IMAGES, LABELS, batch_size) == 5 / 8


def test_all_and_none_right() -> None:
    assert accuracy(nn.Identity(), IMAGES, IMAGES.argmax(1)) == 1.0
    assert accuracy(nn.Identity(), IMAGES, (IMAGES.argmax(1) + 1) % 4) == 0.0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: SimpleNamespace(loss=torch.zeros(8, 4), logits=x),
        lambda x: {"loss": torch.tensor(0.0), "logits": x},
        lambda x: {"scores": x, "features": -x},
        lambda x: (x, -x),
        lambda x: [x, -x],
        lambda x: (None, x),
    ],
)
def test_scores_are_found_in_any_wrapping(wrap: Any) -> None:
    assert accuracy(Returns(wrap), IMAGES, LABELS) == 5 / 8


def test_a_hugging_face_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    wrap = lambda x: outputs.ImageClassifierOutput(loss=torch.tensor(0.0), logits=x)  # noqa: E731
    assert accuracy(Returns(wrap), IMAGES, LABELS) == 5 / 8


class Watcher(nn.Module):
    """Tells a function in which circumstances it ran; what a network keeps itself is put back."""

    def __init__(self, tell: Callable[[tuple[bool, bool, torch.dtype, int]], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        self.tell((self.training or self.norm.training, torch.is_grad_enabled(), x.dtype, len(x)))
        return self.norm(self.linear(x))


def test_it_runs_in_evaluation_mode_without_gradients_in_the_networks_precision() -> None:
    seen: list[tuple[bool, bool, torch.dtype, int]] = []
    model = Watcher(lambda circumstances: seen.append(circumstances)).to(torch.float64).train()
    accuracy(model, IMAGES, LABELS, batch_size=5)
    assert seen == [(False, False, torch.float64, 5), (False, False, torch.float64, 3)]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_statistics_are_as_before(fails: bool) -> None:
    model = Watcher(lambda _: None).train()
    model.norm.eval()
    images = IMAGES[:, :3] if fails else IMAGES
    if fails:
        with pytest.raises(ModelError, match="does not run on the images .* shapes cannot be multiplied"):
            accuracy(model, images, LABELS)
    else:
        accuracy(model, images, LABELS)
    assert (model.training, model.linear.training, model.norm.training) == (True, True, False)
    assert model.state_dict()["norm.num_batches_tracked"] == 0
    assert torch.is_grad_enabled()


def test_a_bfloat16_network() -> None:
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.eye_(model.weight)
    assert accuracy(model, IMAGES, LABELS) == 5 / 8


def test_whole_numbers_stay_whole() -> None:
    model = nn.Sequential(nn.Embedding.from_pretrained(torch.eye(5)[:, :3]), nn.Flatten())
    tokens = torch.tensor([[0], [1], [2]])
    assert accuracy(model, tokens, torch.tensor([0, 1, 0])) == 2 / 3


@pytest.mark.parametrize(
    ("images", "labels", "batch_size", "message"),
    [
        (IMAGES[:0], LABELS[:0], 500, "got 0 images"),
        (IMAGES, LABELS[:7], 500, r"got 8 images, labels \(7,\)"),
        (IMAGES, LABELS[:, None], 500, r"got 8 images, labels \(8, 1\)"),
        (IMAGES, LABELS, 0, "batch_size: expected a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments(images: Tensor, labels: Tensor, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(nn.Identity(), images, labels, batch_size)


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda x: x.sum(1), r"shape \(8,\)"),
        (lambda x: x[:3], r"shape \(3, 4\)"),
        (lambda x: x[..., None], r"shape \(8, 4, 1\)"),
        (lambda x: "none", "got str"),
        (lambda x: {}, "got dict"),
    ],
)
def test_an_output_without_class_scores(wrap: Any, got: str) -> None:
    with pytest.raises(ModelError, match=rf"expected class scores of shape \(8, classes\) from the network, .*{got}"):
        accuracy(Returns(wrap), IMAGES, LABELS)
