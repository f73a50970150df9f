"""Sequences along the second dimension are the images, time steps are not: the same as with the batch first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion import compress, compress_in_steps
from intrafusion.network.images_first import put_images_first
from intrafusion.network.inputs import Inputs
from intrafusion.restore import Synthesis, calibrate

X = torch.randn(100, 7, 6, generator=torch.Generator().manual_seed(0))  # sequences first
PADDING = torch.arange(7) >= torch.arange(100)[:, None] % 4 + 4


class Encoder(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=first)
        self.middle, self.out = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        x = self.layer(self.inside(x), src_key_padding_mask=src_key_padding_mask)
        return self.out(F.relu(self.middle(x)))


class Recurrent(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.inside, self.cell, self.out = nn.Linear(6, 16), nn.GRU(16, 24, batch_first=first), nn.Linear(24, 3)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = self.cell(F.relu(self.inside(x)))[0]
        return self.out(x[:, -1] if self.first else x[-1])


def make(kind: type[nn.Module], first: bool) -> nn.Module:
    torch.manual_seed(0)
    return kind(first).eval()


def turn(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: turn(t) if t.dim() > 2 else t for name, t in value.items()}
    return [turn(t) for t in value] if isinstance(value, list) else value.transpose(0, 1).contiguous()


MASKED = {"x": X, "src_key_padding_mask": PADDING}
CASES: dict[str, tuple[type[nn.Module], Any, Any]] = {
    "encoder": (Encoder, X[:2], X),
    "encoder, one sequence": (Encoder, X[:1], X),
    "as long as many": (Encoder, X[:7], X),
    "encoder with padding": (Encoder, {k: t[:2] for k, t in MASKED.items()}, MASKED),
    "recurrent": (Recurrent, X[:2], list(X.split(30))),
    "recurrent, one sequence": (Recurrent, X[:1], [X[:40], X[40:]]),
}


@pytest.mark.parametrize("case", CASES)
def test_time_first_gives_the_same_network_as_sequences_first(case: str) -> None:
    kind, example, inputs = CASES[case]
    ours = compress(make(kind, False), turn(example), 0.5, inputs=turn(inputs))
    twin = compress(make(kind, True), example, 0.5, inputs=inputs)
    assert ours.plan.sizes == twin.plan.sizes != {}
    assert ours.images is not None
    assert twin.images is not None
    assert ours.images.count == twin.images.count == 80
    assert ours.comparison is not None
    assert ours.comparison.held_out is not None
    assert ours.comparison.held_out.on == "20 images"
    assert ours.comparison.held_out.unseen
    found, expected = ours.comparison.held_out, twin.comparison.held_out  # type: ignore[union-attr]
    assert found.after.error == pytest.approx(expected.after.error, rel=0.2)  # of other places of the same sequences


def test_what_is_answered_along_the_first_dimension_is_not_turned() -> None:
    both = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    for model, example in (
        (make(Encoder, True), X[:2]),
        (both, X[:2]),
        (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)),
        (nn.BatchNorm2d(3, track_running_stats=False), torch.randn(2, 3, 8, 8)),
        (nn.Linear(6, 2), torch.randn(6)),
    ):
        assert put_images_first(Inputs.of(example), model).turned == ()
    assert put_images_first(Inputs.of(turn(X[:2])), make(Encoder, False)).turned == (0,)
    masked = Inputs((turn(X[:7]),), {"src_key_padding_mask": PADDING[:7]})
    assert put_images_first(masked, make(Encoder, False)).turned == (0,)


def test_a_turned_call_reaches_the_network_as_it_came() -> None:
    model, given = make(Encoder, False), turn(X[:5])
    call = Inputs((given,)).turn((0,))
    assert call.args[0].shape == (5, 7, 6)
    assert torch.equal(call.run(model), model(given))
    assert torch.equal(call.call(model)[0], model(given).transpose(0, 1))
    assert str(call) == "(float32[7, 5, 6])"


@pytest.mark.parametrize("level", ["noise", "synthetic"])
def test_made_images_are_sequences_too(level: str) -> None:
    synthesis = Synthesis(images=20, steps=2)
    found = calibrate(make(Encoder, False), turn(X[:2]), level, synthesis=synthesis)
    assert found.images.first.args[0].shape[1:] == (7, 6)
    assert found.images.first.turned == (0,)
    assert found.yardstick.measure(make(Encoder, False)).error == 0


def test_steps_and_given_calibrations_turn_them_as_well() -> None:
    small = compress_in_steps(make(Encoder, False), turn(X[:2]), 0.5, 2, inputs=turn(X))
    assert small.images is not None
    assert small.images.count == 80
    assert calibrate(make(Encoder, False), turn(X[:2]), images=turn(X)).images.count == 100
