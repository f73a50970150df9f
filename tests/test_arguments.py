"""What `checked` reads off annotations, and what it says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from intrafusion import ArgumentError, IntrafusionError, ModelError, compress, load
from intrafusion.arguments import Count, Fraction, Indices, Matrix, Seed, checked, expand_home
from intrafusion.errors import show, unknown_name
from intrafusion.io.folder import load_plan, save_plan
from intrafusion.measure.accuracy import accuracy
from intrafusion.reduce import Fold


@runtime_checkable
class Scored(Protocol):
    def __call__(self, rows: Tensor, count: int, /) -> Tensor: ...


@checked
def door(
    rows: Matrix | None = None,
    kept: Indices | None = None,
    count: Count = 1,
    share: Fraction = 0.5,
    seed: Seed = 0,
    how: Literal["this", "that"] = "this",
    names: Sequence[str] = (),
    sizes: Mapping[str, int | None] | None = None,
    pair: tuple[int, str] = (1, "a"),
    told: Callable[[int, str], None] | None = None,
    score: Scored | None = None,
    groups: Iterable[int] = (),
    flag: bool = False,
    anything: Any = None,
    *more: int,
    **options: float,
) -> str:
    return "done"


@checked
@dataclass(frozen=True)
class Choice:
    rate: float = 0.5


GOOD: list[dict[str, Any]] = [
    {},
    {"rows": torch.ones(2, 3), "kept": torch.tensor([1]), "count": np.int64(3), "share": 1, "seed": 2**32 - 1},
    {"how": "that", "names": ["a"], "sizes": {"a": None, "b": 2}, "pair": (2, "x")},
    {"told": lambda *_: None, "score": lambda rows, count: rows, "groups": iter(["not looked at"]), "flag": True},
    {"anything": object(), "x": 0.5, "y": 3},
]


@pytest.mark.parametrize("arguments", GOOD)
def test_what_the_annotations_say_is_taken(arguments: dict[str, Any]) -> None:
    assert door(**arguments) == "done"


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"rows": torch.ones(3)},
        r"door: rows: expected a matrix of real numbers or None, got a tensor float32\[3\]; see help",
    ),
    ({"rows": np.ones((2, 2))}, r"rows: expected a matrix .* got an array float64\[2, 2\]; torch.from_numpy"),
    ({"rows": torch.ones(2, 2).to_sparse()}, r"rows: expected a matrix .*; make it one with .to_dense\(\)"),
    ({"kept": torch.ones(3)}, r"kept: expected a vector of int64 or None, got a tensor float32\[3\]"),
    ({"count": 0}, "count: expected a whole number of at least 1, got 0"),
    ({"count": True}, "count: expected a whole number of at least 1, got True"),
    ({"count": 10**5000}, "count: expected a whole number of at least 1, got a whole number of 16610 bits"),
    ({"share": float("nan")}, r"share: expected a fraction in \(0, 1\], got nan"),
    ({"share": "half"}, r"share: expected a fraction in \(0, 1\], got 'half'"),
    ({"seed": -1}, r"seed: expected a whole number from 0 to 2\*\*32 - 1, got -1"),
    ({"how": "thus"}, "how: expected 'this' or 'that', got 'thus'"),
    ({"names": "abc"}, "names: expected a list or tuple, got 'abc'"),
    ({"names": ["a", 1]}, r"names\[1\]: expected a name, got 1"),
    ({"names": iter(["a"])}, "names: expected a list or tuple, .*; put what it gives into a list"),
    ({"sizes": {"a": "b"}}, r"sizes\['a'\]: expected a whole number or None, got 'b'"),
    ({"sizes": {1: 2}}, "sizes key: expected a name, got 1"),
    ({"pair": (1,)}, r"pair: expected a tuple of 2, got \(1,\)"),
    ({"told": lambda: None}, "told: expected a function of 2 arguments or None, got the function .*<lambda>"),
    ({"score": lambda rows: rows}, r"score: expected a Scored \(an object with __call__\) or None, got the function"),
    ({"score": Choice}, r"score: .* got the class Choice; that is a class; make an object of it, Choice\(...\)"),
    ({"groups": torch.ones(2)}, "groups: expected an iterable, got a tensor"),
    ({"flag": 1}, "flag: expected True or False, got 1"),
    ({"x": "fast"}, "x: expected a number, got 'fast'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_they_do_not_say_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        door(**arguments)


def test_positional_arguments_and_dataclasses_are_checked_too() -> None:
    with pytest.raises(ArgumentError, match="more: expected a whole number, got 'x'"):
        door(*[None] * 2, 1, 0.5, 0, "this", (), None, (1, "a"), None, None, (), False, None, 1, "x")
    with pytest.raises(ArgumentError, match="Choice: rate: expected a number, got 'x'"):
        Choice("x")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Fold: n_init: expected a whole number"):
        Fold(n_init=2.5)  # type: ignore[arg-type]


def test_missing_and_unknown_arguments_are_left_to_python() -> None:
    with pytest.raises(TypeError, match=r"accuracy\(\) missing 2 required positional arguments"):
        accuracy(nn.Linear(2, 2))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rats'"):
        Choice(rats=1)  # type: ignore[call-arg]


def test_the_signature_stays_what_it_was() -> None:
    assert str(inspect.signature(Choice)) == "(rate: 'float' = 0.5) -> None"
    assert list(inspect.signature(compress).parameters)[:3] == ["model", "example_inputs", "keep"]


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (nn.Linear, r"the class Linear; that is a class; make an object of it, Linear\(...\)"),
        ({"weight": torch.ones(2)}, "build the network, and call load_state_dict on it"),
        (Path("net.pt"), "build the network, and load its weights"),
    ],
)
def test_what_is_given_for_a_network(model: Any, advice: str) -> None:
    with pytest.raises(ModelError, match=f"accuracy: model: expected a torch.nn.Module, got .*{advice}"):
        accuracy(model, torch.ones(1, 2), torch.tensor([0]))


def test_a_long_message_is_cut_in_the_middle() -> None:
    text = str(IntrafusionError("start" + "a" * 10**6 + "end"))
    assert len(text) < 4100
    assert text.startswith("starta")
    assert text.endswith("aend")


def test_what_a_message_shows_is_short_whatever_it_is() -> None:
    within: dict[str, Any] = {}
    within["a"] = within
    deep: list[Any] = []
    for _ in range(10**4):
        deep = [deep]
    shown = [show(v) for v in (within, deep, "a" * 10**6, 10**6000, torch.zeros(1000, 1000), nn.Linear(2, 2), None)]
    assert all(len(text) < 150 for text in shown)
    assert shown[-1] == "None"
    assert unknown_name("thing", ["x"], ["b", "a"]) == "unknown thing ['x']. Valid: a, b."


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_begin_at_the_home_of_the_user(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is checked takes it so; names and texts that are no paths stay."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    small = compress(model, torch.randn(2, 4), 0.5, restore=None)
    small.save(kind("~/small"))
    save_plan(small.plan, folder=kind("~/again"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "small"]
    again = load(kind("~/small"), lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert again[0].out_features == 4
    assert load_plan(kind("~/again")) == small.plan
    assert small.export(kind("~/net.pt2")).path == tmp_path / "net.pt2"
    assert expand_home(kind("a~/~")) == kind("a~/~")
    assert expand_home(None) is None
