"""What a forward decides by values is noted, answered again in another network, and answered otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.core import Wired
from torch import Tensor, nn

from intrafusion.graph import Way
from intrafusion.network.decisions import Decisions, ListsRead, call_ways, is_within, name_line
from intrafusion.network.inputs import Inputs

X = torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0]])
Wiring = Callable[[Any, Tensor], Tensor]


def run(wiring: Wiring, x: Tensor, decisions: Decisions) -> Tensor:
    with decisions.played():
        return Wired(wiring)(x)


DECIDING: dict[str, Wiring] = {
    "truth": lambda net, x: x + 1 if x.sum() > 0 else x * 2,
    "whole number": lambda net, x: x + int((x[:, 0] > 0).sum()),
    "places": lambda net, x: x[torch.where(x[:, 0] > 0)],
    "mask": lambda net, x: x[x[:, 0] > 0],
    "entries": lambda net, x: x.masked_select(x > 0),
    "list": lambda net, x: torch.stack([x[k] for k in x.argmax(1).tolist()]),
}


@pytest.mark.parametrize("name", DECIDING)
def test_what_was_decided_is_decided_again(name: str) -> None:
    """On other values: the rows, or the branch, are those of the first."""
    first = Decisions()
    run(DECIDING[name], X, first)
    other = -X
    expected = {
        "truth": other + 1,
        "whole number": other + 2,
        "places": other[:2],
        "mask": other[:2],
        "entries": other[X > 0],
        "list": torch.stack([other[0], other[1], other[1]]),
    }[name]
    found = run(DECIDING[name], other, Decisions(first.record))
    assert torch.equal(found, expected)
    assert not torch.equal(DECIDING[name](None, other), expected), "the values themselves must say something else"


def test_numbers_with_a_point_follow_the_values() -> None:
    """Else a proof would compare with a number that the smaller network does not use."""
    wiring: Wiring = lambda net, x: x / x.sum().item()  # noqa: E731
    first = Decisions()
    run(wiring, X, first)
    assert torch.equal(run(wiring, 2 * X, Decisions(first.record)), 2 * X / (2 * X).sum().item())


def test_answers_that_do_not_fit_are_not_given() -> None:
    first = Decisions()
    run(DECIDING["mask"], X, first)
    assert torch.equal(run(DECIDING["mask"], X[1:], Decisions(first.record)), X[1:2])


def test_an_answer_is_forced() -> None:
    noted = Decisions()
    run(DECIDING["truth"], X, noted)
    (place,) = noted.values
    assert noted.values[place] == [True]
    assert torch.equal(run(DECIDING["truth"], X, Decisions(forced={place: False})), X * 2)


def test_a_loop_that_waits_for_another_answer_ends() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        while x.sum() < 10:
            x = x + 1
        return x

    noted = Decisions()
    run(wiring, X, noted)
    (place,) = noted.values
    assert run(wiring, X, Decisions(forced={place: True})).sum() >= 10


@pytest.mark.parametrize("name", ["places", "mask", "entries"])
def test_masks_select_everything(name: str) -> None:
    assert torch.equal(run(DECIDING[name], -X.abs(), Decisions(whole=True)).flatten(), -X.abs().flatten())


def test_the_order_of_what_is_sorted_is_answered() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        values, places = x.topk(1, dim=0)
        return values + 10 * places

    first = Decisions(ordered=True)
    run(wiring, X, first)
    found = run(wiring, -X, Decisions(first.record, ordered=True))
    assert torch.equal(found, torch.tensor([[-3.0 + 10, -6.0 + 20]]))  # rows 1 and 2, as of X
    assert torch.equal(run(wiring, -X, Decisions(first.record)), torch.tensor([[5.0 + 20, 2.0]]))  # if not asked for


def test_arrays_cannot_be_answered_and_are_noted() -> None:
    noted = Decisions()
    run(lambda net, x: x + float(x.numpy().max()), X, noted)
    assert [name_line(place).rpartition(":")[0] for place in noted.opaque] == [__file__]


@pytest.mark.parametrize("make", [Tensor.tolist, Tensor.numpy])
def test_lists_are_seen(make: Callable[[Tensor], Any]) -> None:
    with ListsRead() as lists:
        assert not lists.found
        make(X + 1)
    assert lists.found


def test_what_a_module_of_pytorch_asks_is_known() -> None:
    noted = Decisions()
    net = nn.AdaptiveLogSoftmaxWithLoss(2, 4, [2], div_value=1)
    with noted.played():
        net(X, torch.tensor([0, 1, 3]))
    assert noted.made
    assert all(map(is_within, noted.made))


def test_other_ways_follow_the_first() -> None:
    noted = Decisions()
    model = Wired(DECIDING["truth"])
    run(DECIDING["truth"], -X, noted)
    ways = [Way({}), Way(noted.record), Way({}, ((-X,), {}))]
    found = call_ways(lambda given: given.call(model), Inputs.of(X), 1, ways)
    assert [t.tolist() for t in found] == [(X + 1).tolist(), (X * 2).tolist(), (-X * 2).tolist()]
