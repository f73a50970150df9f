"""Output error and agreement of labels against figures worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion.measure.closeness as closeness_module
from intrafusion.measure.closeness import Closeness, Yardstick
from intrafusion.measure.comparison import HeldOut, percent
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs

X = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
OTHER = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 1.0]])


class Gives(nn.Module):
    """These outputs in this form, whatever comes in."""

    def __init__(self, outputs: Tensor, form: Any = None) -> None:
        super().__init__()
        self.outputs, self.form = nn.Parameter(outputs), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.outputs) if self.form else self.outputs


def measure(form: Any = None) -> Closeness:
    return Yardstick(Gives(X, form), Inputs((X,))).measure(Gives(OTHER, form))


def test_error_and_agreement() -> None:
    found = measure()
    assert found.error == pytest.approx(4 / float((X - X.mean(0)).square().sum()))
    assert found.agreement == 0.75


@pytest.mark.parametrize(
    "form",
    [lambda t: {"logits": t, "embedding": t.sum()}, lambda t: SimpleNamespace(hidden=t[None], logits=t), lambda t: [t]],
    ids=["dict", "attribute", "list"],
)
def test_class_scores_are_found_in_containers(form: Any) -> None:
    assert measure(form).agreement == 0.75


@pytest.mark.parametrize(
    "form",
    [lambda t: t[None], lambda t: t[:, :1], lambda t: (t, t), lambda t: t.argmax(1)],
    ids=["3-d", "one column", "two outputs", "whole numbers"],
)
def test_what_are_no_class_scores_has_no_agreement(form: Any) -> None:
    assert measure(form).agreement is None


def test_an_error_that_is_no_number_is_worse_than_any() -> None:
    assert Closeness(float("nan")).is_worse_than(Closeness(5.0))
    assert not Closeness(5.0).is_worse_than(Closeness(float("nan")))
    assert not Closeness(0.5).is_worse_than(Closeness(0.5))
    assert str(Yardstick(Gives(X), Inputs((X,)), "noise images")) == "4 noise images"


def test_batches_give_the_error_of_all_at_once() -> None:
    """Also where outputs are undefined at some places, or are sequences of which not all positions count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64) + 50
    a, b = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    for model in (a, b):
        model.requires_grad_(False).bias[1] = float("-inf")
    whole = Yardstick(a, Inputs((x,))).measure(b)
    spread = (a(x) - a(x).mean(0))[:, [0, 2, 3]].square().sum()
    assert whole.error == pytest.approx(float((a(x) - b(x))[:, [0, 2, 3]].square().sum() / spread))
    for sizes in ([1] * 30, [1, 29], [10, 20]):
        found = Yardstick(a, Batches.of(*(Inputs((part,)) for part in x.split(sizes)))).measure(b)
        assert found.error == pytest.approx(whole.error, rel=1e-9)
        assert found.agreement == whole.agreement


def test_what_is_too_large_to_be_kept_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    a, b, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(30, 6)
    a.register_forward_hook(lambda *_: calls.append(1))
    yardstick = Yardstick(a, Batches.of(*(Inputs((part,)) for part in x.split(10))))
    monkeypatch.setattr(closeness_module, "_KEPT", 2 * 10 * 4 * 4)  # outputs of two batches
    first = yardstick.measure(b)
    assert len(calls) == 3
    assert yardstick.measure(b) == first
    assert len(calls) == 4


class Scaled(nn.Module):
    """Two outputs, of which one is a thousand times as large, labels, and a constant."""

    def __init__(self, off: tuple[float, float]) -> None:
        super().__init__()
        self.off = off

    def forward(self, x: Tensor) -> dict[str, Any]:
        small, large = x[:, :2], 1000 * x[:, 2:]
        a, b = self.off
        constant = torch.full((2,), 5.0)
        return {"small": small + a, "large": [large + 1000 * b], "labels": x.argmax(1), "grid": constant}


def test_each_of_several_outputs_stands_beside_its_own_variance() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    yardstick = Yardstick(Scaled((0, 0)), Inputs.of(x))
    found = yardstick.measure(Scaled((3, 0.1)))
    variances = {"small": x[:, :2].var(0, correction=0).mean(), "large": x[:, 2:].var(0, correction=0).mean()}
    expected = {"small": 9 / float(variances["small"]), "large": 0.01 / float(variances["large"]), "grid": 0.0}
    assert found.outputs == pytest.approx(expected)
    assert found.error == pytest.approx(expected["small"])
    better = yardstick.measure(Scaled((0.1, 0.2)))
    assert found.is_worse_than(better)
    assert not better.is_worse_than(found)
    words = HeldOut("50 images", True, found).row()[1]
    shown = [f"{percent(expected[name])} ({name})" for name in ("small", "large", "grid")]
    assert f"differ by {', '.join(shown)} of their variance" in words


def test_places_name_the_outputs_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, 2 * x

    found = Yardstick(Pair(), Inputs.of(torch.randn(9, 3))).measure(Pair())
    assert found.outputs == {"output 0": 0.0, "output 1": 0.0}
