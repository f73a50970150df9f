"""What of the making of images fits into a time, by what a step takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafusion.errors import ModelError
from intrafusion.restore import Synthesis, affordable
from intrafusion.restore.affordable import find_affordable, time_image

X = torch.randn(1, 3, 8, 8)
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.mark.parametrize(
    ("each", "fits"),
    [(1e-4, (128, 250)), (2e-3, (64, 120)), (4e-3, (64, 60)), (1.0, None)],
)
def test_the_largest_that_fits(each: float, fits: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affordable, "time_image", lambda *_: each)
    found = find_affordable(MODEL, X, Synthesis(seed=3), 20.0)
    assert found.seconds == pytest.approx(each * 128 * 250)
    assert found.is_whole is (fits == (128, 250))
    got = found.synthesis
    assert (None if got is None else (got.images, got.steps)) == fits
    assert got is None or got.seed == 3


def test_it_says_what_the_whole_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affordable, "time_image", lambda *_: 2e-3)
    said = find_affordable(MODEL, X, Synthesis(), 20.0).explain()
    assert said == "64 images are made in 120 steps: 128 in 250 steps would take about 64 s here"
    said = find_affordable(MODEL, X, Synthesis(), 1.0).explain()
    assert said == "making images from the network is left out: 128 in 250 steps would take about 64 s here"


def test_fewer_are_never_more_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affordable, "time_image", lambda *_: 1e-3)
    assert find_affordable(MODEL, X, Synthesis(images=32, steps=100), 2.0).synthesis is None


class Clock:
    """The first step of each network takes long, every other one a second for each image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sizes, self.first = 0.0, list[int](), True
        monkeypatch.setattr(affordable.time, "perf_counter", lambda: self.now)
        MODEL_CALL = nn.Sequential.forward

        def forward(module: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
            self.now += 1000.0 if self.first else 1e-3 * len(x)
            self.first = False
            self.sizes.append(len(x))
            return MODEL_CALL(module, x)

        monkeypatch.setattr(nn.Sequential, "forward", forward)


def test_a_step_is_timed_on_few_images_and_the_first_one_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert time_image(MODEL, X, Synthesis()) == pytest.approx(1e-3)
    assert clock.sizes == [2, *[2] * 4, 2, *[8] * 4, 2, *[32] * 4]  # what two take of memory is looked at first


def test_long_steps_are_not_tried_with_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affordable, "_LONG", 1e-3)
    clock = Clock(monkeypatch)
    assert time_image(MODEL, X, Synthesis()) == pytest.approx(1e-3)
    assert clock.sizes == [2, *[2] * 4]


def test_what_no_image_can_be_made_for_is_refused() -> None:
    with pytest.raises(ModelError, match="expected a network of one floating-point input"):
        find_affordable(MODEL, (X, X), Synthesis(), 20.0)
