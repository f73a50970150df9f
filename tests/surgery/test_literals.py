"""Sizes in attributes follow the channels: which of them, found under the proof; and words for those in the code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gallery.core import Wired
from torch import Tensor, nn

import intrafusion
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError, PlanError
from intrafusion.surgery import operate
from intrafusion.surgery.numbers import find_numbers, write_number_

SIZES = {"in_channels", "out_channels", "in_features", "out_features", "num_features"}


def select(model: nn.Module, x: Tensor, keep: Any = 0.5, **options: Any) -> Compressed:
    return intrafusion.compress(model, x, keep, **{"reducer": "select", "restore": None, **options})


def followed(small: Compressed) -> dict[tuple[str, str], tuple[Any, Any]]:
    """What followed besides the sizes of layers: (module, place) -> old and new."""
    return {(r.module, r.attribute): (r.old, r.new) for r in small.repairs if r.attribute not in SIZES}


def kept_rows(small: nn.Module, model: nn.Module) -> Tensor:
    """Which rows of layer `a` a selection kept."""
    ours, theirs = small.get_submodule("a").weight, model.get_submodule("a").weight
    return torch.tensor([next(k for k in range(len(theirs)) if torch.equal(theirs[k], row)) for row in ours])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Config:
    dim: int


class Pair(NamedTuple):
    rows: int
    dim: int


class Holder(nn.Module):
    """Sixteen channels, whose number is held in one place or another, and a function that uses it."""

    def __init__(self, held: dict[str, Any], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.use = nn.Linear(6, 16), nn.Linear(16, 3), use
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(self, self.a(x).relu()))


class OfTheClass(Holder):
    width = 16


def split(net: Any, h: Tensor, sizes: Any) -> Tensor:
    first, second = h.split(sizes, -1)
    return torch.cat([first.tanh(), second.sin()], -1)


HELD: dict[str, tuple[nn.Module, dict[str, tuple[int, int]]]] = {
    "an attribute": (Holder({"size": 16}, lambda net, h: h.view(-1, net.size)), {"size": (16, 8)}),
    "a list": (
        Holder({"sizes": [4, 12]}, lambda net, h: split(net, h, net.sizes)),
        {"sizes.0": (4, 2), "sizes.1": (12, 6)},
    ),
    "a tuple": (
        Holder({"sizes": (4, 12)}, lambda net, h: split(net, h, net.sizes)),
        {"sizes.0": (4, 2), "sizes.1": (12, 6)},
    ),
    "a config": (Holder({"cfg": Config(16)}, lambda net, h: h.reshape(-1, net.cfg.dim)), {"cfg.dim": (16, 8)}),
    "a dict": (Holder({"cfg": {"dim": 16}}, lambda net, h: h.view(4, net.cfg["dim"])), {"cfg.dim": (16, 8)}),
    "a named tuple": (Holder({"cfg": Pair(4, 16)}, lambda net, h: h.view(*net.cfg)), {"cfg.dim": (16, 8)}),
    "the class": (OfTheClass({}, lambda net, h: h.view(4, net.width)), {"width": (16, 8)}),
    "computed with": (
        Holder({"dim": 16}, lambda net, h: h.view(4, 2, net.dim // 2).flatten(1)),
        {"dim": (16, 8)},
    ),
    "a half": (Holder({"half": 8}, lambda net, h: h.view(4, 2, net.half).flatten(1)), {"half": (8, 4)}),
}


@pytest.mark.parametrize("where", HELD)
def test_a_size_in_an_attribute_follows(where: str) -> None:
    model, expected = HELD[where]
    model = model.eval()
    x = torch.randn(4, 6)
    if where == "a named tuple":
        expected = {"cfg.1": expected["cfg.dim"]}
    small = select(model, x)
    assert followed(small) == {("", place): change for place, change in expected.items()}
    assert small.model.get_submodule("a").out_features == 8
    assert small.plan.decisions[0].proof == "function"
    assert small.model(x).shape == (4, 3)


def test_the_network_without_the_channels_is_what_comes_out() -> None:
    """Against the original in which the reader finds zeros where the removed channels come in."""
    torch.manual_seed(0)
    model = Holder({"size": 16}, lambda net, h: h.view(-1, 1, net.size).mean(1)).eval()
    x = torch.randn(4, 6)
    small = select(model, x).model
    removed = torch.tensor([k for k in range(16) if k not in kept_rows(small, model)])
    reference = copy.deepcopy(model)
    reference.b.weight.data[:, removed] = 0
    torch.testing.assert_close(small(x), reference(x))


def test_the_original_and_what_it_shares_stay_as_they_were() -> None:
    shared = {"dim": 16}
    use = lambda net, h: h.view(4, net.cfg["dim"])  # noqa: E731
    first, second = Holder({"cfg": shared}, use).eval(), Holder({"cfg": shared}, use).eval()
    x = torch.randn(4, 6)
    small = select(first, x, inplace=True)
    assert small.model is first
    assert first.cfg == {"dim": 8}
    assert shared == second.cfg == {"dim": 16}
    assert OfTheClass.width == 16
    assert first(x).shape == second(x).shape == (4, 3)


class Pixels(nn.Module):
    """Sixteen channels on sixteen by sixteen pixels; both numbers are used in one view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.side, self.channels, self.batch, self.spare = 16, 16, 2, 16

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).flatten(1).view(self.batch, self.channels, self.side, self.side))


def test_of_two_numbers_that_are_alike_the_one_that_is_a_width_follows() -> None:
    small = select(Pixels().eval(), torch.randn(2, 3, 16, 16))
    assert followed(small) == {("", "channels"): (16, 8)}


def test_layers_of_pytorch_without_tensors_follow() -> None:
    decoder = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 3, 4))
    small = select(decoder.eval(), torch.randn(2, 10))
    assert followed(small) == {("2", "unflattened_size.0"): (8, 4)}
    assert small.model.get_submodule("0").out_features == 64


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dims = (width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.inner(x).relu().reshape(-1, 3, self.dims[1])).reshape(-1, 3, self.dims[0])


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), *(Block(6) for _ in range(6)), nn.Linear(6, 2)).eval()


def test_blocks_of_one_class_follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    original = operate.trace_private
    monkeypatch.setattr(operate, "trace_private", lambda *a, **k: traces.append(1) or original(*a, **k))
    small = select(blocks(), torch.randn(2, 3, 5))
    assert followed(small) == {(str(k), f"dims.{i}"): (n, n // 2) for k in range(1, 7) for i, n in ((0, 6), (1, 12))}
    assert len(traces) < 8  # not one search for each block


def test_groups_of_other_sizes_have_numbers_of_their_own() -> None:
    model = blocks()
    small = select(model, torch.randn(2, 3, 5), {"1.inner": 0.25, "2.inner": 0.75, "*": 1.0})
    assert followed(small) == {("1", "dims.1"): (12, 3), ("2", "dims.1"): (12, 9)}


def test_a_target_is_met_where_numbers_follow() -> None:
    model = blocks()
    small = select(model, torch.randn(2, 3, 5), None, target={"params": 0.5})
    assert small.after.params == pytest.approx(small.before.params / 2, rel=0.1)
    assert not small.rolled_back


# ---- folders --------------------------------------------------------------------------------------------------------


def test_numbers_are_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = HELD["a list"]
    x = torch.randn(4, 6)
    small = select(model, x)
    small.save(tmp_path / "small")
    original = copy.deepcopy(model)
    loaded = intrafusion.load(tmp_path / "small", original)
    assert loaded is original
    assert loaded.sizes == [2, 6]
    assert torch.equal(loaded(x), small.model(x))


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        ("sizes.0", 5000, "would become 5000 from 4"),
        ("sizes.7", 2, "is no size of this network"),
        ("sizes.__class__", 2, "is no size of this network"),
        ("use.__code__.co_stacksize", 2, "is no size of this network"),
    ],
)
def test_a_folder_cannot_write_elsewhere(
    place: str, new: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = HELD["a list"]
    small = select(model, torch.randn(4, 6))
    bad = replace(
        small,
        repairs=tuple(replace(r, attribute=place, new=new) if r.attribute == "sizes.0" else r for r in small.repairs),
    )
    bad.save(tmp_path / "bad")
    original = copy.deepcopy(model)
    with pytest.raises(PlanError, match=message):
        intrafusion.load(tmp_path / "bad", original)
    assert original.sizes == [4, 12]


# ---- what cannot follow ---------------------------------------------------------------------------------------------


def test_a_number_in_the_code_is_named_with_its_line() -> None:
    def use(net: Any, h: Tensor) -> Tensor:
        h = h.T
        return h.reshape(1, 16, 4)[0].T

    small = select(Holder({"size": 16}, use).eval(), torch.randn(4, 6))
    line = use.__code__.co_firstlineno + 2
    assert small.model.size == 16
    assert f"; at test_literals.py:{line}, where 16 is written in the code: take it" in small.rolled_back["a"]


def test_a_number_is_named_where_too_few_parts_come_of_it() -> None:
    def use(net: Any, h: Tensor) -> Tensor:
        early, late = h.split(
            8, dim=1
        )  # fmt: skip
        return torch.cat([early.tanh(), late], 1)

    small = select(Holder({}, use).eval(), torch.randn(4, 6))
    told = f"at test_literals.py:{use.__code__.co_firstlineno + 1}, where 8 is written in the code"
    assert [told in why for why in small.rolled_back.values()] == [True, True]


def test_a_number_that_makes_it_run_and_is_wrong_is_not_taken() -> None:
    """With `side` 2 for 4 the reshape works, and mixes channels with pixels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.b(net.a(x).reshape(len(x), 4, net.side, -1)).mean((2, 3))

    model: Any = Wired(wiring, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 3, 1)).eval()
    model.side = 4
    small = select(model, torch.randn(2, 3, 4, 4))
    assert followed(small) == {}
    assert set(small.rolled_back) == {"a"}
    assert model.side == 4


# ---- places ---------------------------------------------------------------------------------------------------------


def test_numbers_are_found_in_what_a_module_holds_and_nowhere_else() -> None:
    module: Any = nn.Module()
    module.a, module.flag, module.many = 3, True, list(range(1000))
    module.nested = {"x": [1, (2, Pair(5, 6))], 4: 9}
    module.inner = nn.Linear(2, 2)
    loop: list[Any] = [7]
    module.loop = loop
    loop.append(loop)
    assert find_numbers(module) == {"a": 3, "nested.x.0": 1, "loop.0": 7} | {"nested.x.1.0": 2}


def test_writing_leaves_what_others_hold_alone() -> None:
    module: Any = nn.Module()
    config = Config(4)
    module.held = held = {"a": [1, (Pair(2, 3), config)]}
    write_number_(module, "held.a.1.0.1", 9)
    write_number_(module, "held.a.1.1.dim", 8)
    assert module.held == {"a": [1, (Pair(2, 9), Config(8))]}
    assert isinstance(module.held["a"][1][0], Pair)
    assert held == {"a": [1, (Pair(2, 3), config)]}
    assert config.dim == 4


# ---- a state from the last call -------------------------------------------------------------------------------------


class Keeping(nn.Module):
    """Adds what it remembers of its last call, at the width of its hidden layer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.back, self.b = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.where, self.last, self.queue, self.cache = where, None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        held = {"last": [self.last], "queue": self.queue, "cache": list(self.cache.values())}[self.where]
        h = self.a(x).tanh() + sum(self.back(state) for state in held if state is not None)
        if self.where == "last":
            self.last = h.detach()
        elif self.where == "queue":
            self.queue[:] = [*self.queue, h.detach()][-2:]
        else:
            self.cache["state"] = h.detach()
        return self.b(h)


@pytest.mark.parametrize("where", ["last", "queue", "cache"])
def test_a_state_that_is_made_by_the_first_call_has_the_new_width(where: str) -> None:
    """The second call reads what the first left, also where that lies inside a list or a dict."""
    model, x = Keeping(where).eval(), torch.randn(3, 5)
    small = select(model, x).model
    rows = kept_rows(small, model)
    removed = torch.tensor([k for k in range(8) if k not in rows])
    reference = copy.deepcopy(model)
    for layer in (reference.back, reference.b):
        layer.weight.data[:, removed] = 0
    for _ in range(3):
        torch.testing.assert_close(small(x), reference(x))
    assert not model.queue
    assert not model.cache


@pytest.mark.parametrize(("where", "place"), [("last", "last"), ("queue", "queue.0"), ("cache", "cache.state")])
def test_a_state_of_the_old_width_is_refused_in_words(where: str, place: str) -> None:
    model, x = Keeping(where).eval(), torch.randn(3, 5)
    model(x)
    with pytest.raises(ModelError, match=rf"tensors of that width in attributes \({place}\): clear what it keeps"):
        select(model, x)


def test_a_state_of_zeros_is_refused_in_words_too() -> None:
    """A permutation does not see it."""
    model, x = Keeping("last").eval(), torch.randn(3, 5)
    model.last = torch.zeros(3, 8)  # type: ignore[assignment]
    assert "tensors of that width in attributes (last)" in select(model, x).rolled_back["a"]


# ---- a number that means two things ---------------------------------------------------------------------------------


class Tokens(nn.Module):
    """The width, which a norm sees together, is also what `also` takes it for."""

    def __init__(self, also: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.n, self.also = 16, also
        self.a, self.norm, self.b = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.also(self.a(x).reshape(len(x), -1, self.n), self.n)
        return self.b(self.norm(x).mean(1))


@pytest.mark.parametrize(
    "also",
    [
        lambda x, n: x[:, :n],
        lambda x, n: x.clamp(-n / 16, n / 16),
        lambda x, n: x * (torch.arange(x.shape[1]) < n)[:, None],
    ],
    ids=["length", "limit", "mask"],
)
def test_a_number_does_not_follow_channels_of_which_no_function_is_proved(also: Any) -> None:
    """Nothing would compare what else it does."""
    model, x = Tokens(also).eval(), torch.randn(2, 16, 5)
    small = select(model, x)
    assert small.plan.maps == {}
    assert model.n == small.model.n == 16
    torch.testing.assert_close(small.model(x), model(x))


class Step(nn.Module):
    """Of one class, once the number is the width, once it is a number of pixels."""

    def __init__(self, inputs: int, *, crops: bool) -> None:
        super().__init__()
        self.n, self.crops, self.a = 16, crops, nn.Conv2d(inputs, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.crops:
            return self.a(x[:, :, : self.n, : self.n]).relu()
        return self.a(x).relu().view(len(x), self.n, *x.shape[2:])


def test_only_the_module_that_needs_it_is_given_another_number() -> None:
    parts = Step(3, crops=True), Step(16, crops=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*parts).eval()
    with torch.no_grad():
        for step in (model[0], model[1]):
            step.a.weight[1::2], step.a.bias[1::2] = 0, 0  # type: ignore[union-attr]
    small = select(model, torch.randn(2, 3, 8, 8))
    assert (small.model[0].n, small.model[1].n) == (16, 8)  # type: ignore[index]
    large = torch.randn(2, 3, 20, 20)  # larger than the crop, as the example was not
    torch.testing.assert_close(small.model(large), model(large))
    (note,) = (note for note in small.notes if "numbers in attributes" in note)
    assert "1.n 16 -> 8" in note
    assert "exclude these layers" in note


class OneList(nn.Module):
    """A chain whose layers are equally wide; the widths of all stand in one list."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widths = [16] * count
        self.layers = nn.ModuleList(nn.Linear(6 if k == 0 else 16, 16) for k in range(count))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, width in zip(self.layers, self.widths, strict=True):
            x = layer(x).view(-1, width).relu()
        return self.head(x)


@pytest.mark.parametrize(("count", "left"), [(5, (0,)), (5, (1, 2)), (7, (2,)), (7, (0, 6))])
def test_entries_of_a_list_follow_one_by_one_where_some_of_their_layers_stay(
    count: int, left: tuple[int, ...], tmp_path: Path
) -> None:
    """All entries hold one size, and every wrong one fails somewhere in the same loop."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    small = intrafusion.compress(
        OneList(count).eval(), x, keep=0.5, exclude=[f"layers.{k}" for k in left], restore=None
    )
    assert small.rolled_back == {}
    assert small.model.widths == [16 if k in left else 8 for k in range(count)]
    assert {d.proof for d in small.plan.decisions if d.reduced} == {"function"}
    small.save(tmp_path / "small")
    assert torch.equal(intrafusion.load(tmp_path / "small", OneList(count)).eval()(x), small.model(x))
