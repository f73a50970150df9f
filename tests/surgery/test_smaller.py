"""Proofs on a smaller image: only where the network demonstrably does the same there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion.network.inputs import Inputs
from intrafusion.surgery import permute
from intrafusion.surgery.smaller import find_smaller
from intrafusion.trace import trace


class _Net(nn.Module):
    def __init__(self, kind: str = "", taps: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 6, (taps, 1), padding=(taps // 2, 0))
        self.head = nn.Linear(6, 2)
        self.places = nn.Parameter(torch.randn(1, 4, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        if self.kind == "places":
            x = x + self.places
        if self.kind == "size" and x.shape[-1] > 48:
            x = x.sigmoid()
        if self.kind == "small" and x.shape[-1] < 48:
            x = x + torch.arange(4.0).view(1, 4, 1, 1)
        if self.kind == "values" and x.mean() > 100:
            x = -x
        if self.kind == "view":
            x = x.reshape(len(x), 4, -1)[..., None]
        return self.head(self.inner(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "size"), [("", 64), *((k, None) for k in ("places", "size", "small", "values", "view"))]
)
def test_only_where_the_network_does_the_same(kind: str, size: int | None) -> None:
    model, image = _Net(kind).eval(), torch.randn(1, 3, 128, 128)
    found = find_smaller(model, trace(model, image), Inputs.of(image))
    assert (None if found is None else found.tensors()[0].shape[-1]) == size


def test_every_tap_of_a_kernel_meets_the_image() -> None:
    model, image = _Net(taps=67).eval(), torch.randn(1, 3, 160, 160)  # of 32 places, taps further off meet zeros alone
    found = find_smaller(model, trace(model, image), Inputs.of(image))
    assert found is None


def test_what_fails_there_is_tried_on_the_given_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = _Net("small").eval(), torch.randn(1, 3, 128, 128)
    whole = intrafusion.inspect(model, image)
    assert whole.reducible
    tried = list[Inputs]()

    def take_part(*given: object) -> Inputs:
        tried.append(Inputs.of(image[..., :64, :64]))
        return tried[-1]

    monkeypatch.setattr(permute, "find_smaller", take_part)
    assert [g.reason for g in intrafusion.inspect(model, image).groups] == [g.reason for g in whole.groups]
    assert tried
