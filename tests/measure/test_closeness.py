"""Output error and agreement of labels against figures worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intrafusion.measure.closeness import Closeness, Yardstick
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
