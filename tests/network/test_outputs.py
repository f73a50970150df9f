"""Every tensor of an output is found, wherever it lies; what cannot be opened is named."""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion import compress, inspect
from intrafusion.errors import ModelError
from intrafusion.measure.drift import output_rows
from intrafusion.network.inputs import Inputs
from intrafusion.network.outputs import LONGEST, open_output

A, B, C = (torch.full((2,), float(k)) for k in range(3))


@dataclass
class Features:
    maps: Any
    more: Any = field(default=None)


class EasyDict(dict):
    __getattr__ = dict.__getitem__


class Slotted:
    __slots__ = ("__hidden", "empty", "maps")

    def __init__(self, maps: Any, hidden: Any) -> None:
        self.maps, self.__hidden = maps, hidden


class Named(dict):
    """Keeps the same tensor as an entry and as an attribute, and one as an attribute alone."""

    def __init__(self, entries: dict[str, Any], extra: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries, extra=extra)


class Cyclic:
    def __init__(self, maps: Any) -> None:
        self.maps, self.me = maps, self


def stream(*items: Any) -> Any:
    yield from items


Pair = namedtuple("Pair", "first second")

FORMS: dict[str, tuple[Any, list[Tensor]]] = {
    "tensor": (A, [A]),
    "nested containers": ((A, [B, {"x": (C,)}]), [A, B, C]),
    "one tensor twice": ((A, A), [A, A]),
    "dataclass in a tuple": ((A, Features(B, Features(C))), [A, B, C]),
    "ordered and user dicts": (OrderedDict(a=A, b=UserDict(c=B)), [A, B]),
    "user list and deque": ((UserList([A]), deque([B])), [A, B]),
    "dict subclass": (EasyDict(feature=A), [A]),
    "dict with attributes": (Named({"a": A}, B), [A, B]),
    "namespace": (SimpleNamespace(a=A, b=[B]), [A, B]),
    "named tuple": (Pair(A, Pair(B, None)), [A, B]),
    "slots": (Slotted(B, A), [A, B]),
    "generator": (stream(A, stream(B)), [A, B]),
    "map and zip": ((map(abs, [A]), zip([B], [C], strict=True)), [A, B, C]),
    "dictionary views": ({"a": A, "b": B}.values(), [A, B]),
    "itself": (Cyclic(A), [A]),
    "distribution": (torch.distributions.Normal(A, B.abs()), [A, B]),
    "plain values": ((1, "a", None, 2.0, A.shape, A.dtype, True), []),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_found_in_order(form: str) -> None:
    output, expected = FORMS[form]
    opened = open_output(output)
    assert [t.tolist() for t in opened.tensors] == [t.tolist() for t in expected]
    assert opened.closed == []


def test_hugging_face_outputs() -> None:
    made = pytest.importorskip("transformers.modeling_outputs")
    assert open_output(made.BaseModelOutput(last_hidden_state=A, hidden_states=(B, C))).tensors == [A, B, C]


def test_what_cannot_be_opened_is_named() -> None:
    opened = open_output((A, A.numpy(), nn.Linear(1, 1), lambda: B))
    assert opened.tensors == [A]
    assert opened.closed == ["ndarray", "Linear", "function"]


def test_an_iterator_without_an_end_is_refused() -> None:
    with pytest.raises(ModelError, match=f"iterator .count. of more than {LONGEST} items"):
        open_output(itertools.count())


def test_tensors_in_a_set_have_no_order() -> None:
    with pytest.raises(ModelError, match="in a set, which has no order"):
        open_output({A})


class Net(nn.Module):
    """Gives a mean and, in some form, the features."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form, self.a, self.b, self.c = form, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.a(x))
        return self.c(F.relu(self.b(features))).mean((2, 3)), self.form(features)


WRAPS: dict[str, Any] = {
    "dataclass": Features,
    "namespace": lambda x: SimpleNamespace(deep=[{"x": x}]),
    "dict subclass": lambda x: EasyDict(x=x),
    "user dict": lambda x: UserDict(x=x),
    "generator": lambda x: (x * k for k in (1, 2)),
    "slots": lambda x: Slotted(x, None),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_features_that_leave_the_network_keep_their_size(wrap: str) -> None:
    model, x = Net(WRAPS[wrap]).eval(), torch.randn(2, 3, 6, 6)
    small = compress(model, x, 0.5, restore=None)
    assert (small.model.a.out_channels, small.model.b.out_channels) == (8, 4)
    assert inspect(model, x)["a"].reason == "output of the network"


@dataclass
class Answer:
    scores: Tensor
    state: Any


class KeyValueCache:
    def __init__(self, x: Tensor) -> None:
        self.layers = [x]


class ScoresAndState(NamedTuple):
    scores: Tensor
    state: Any


@pytest.mark.parametrize("form", [Answer, ScoresAndState, lambda a, b: {"scores": a, "state": b}])
def test_reasons_name_the_part_of_the_output(form: Any) -> None:
    class Parts(Net):
        def forward(self, x: Tensor) -> Any:
            return form(*super().forward(x))

    graph = inspect(Parts(lambda x: (x, x)).eval(), torch.randn(2, 3, 6, 6))
    assert graph["a"].reason == "output of the network (state)"
    assert graph["c"].reason == "output of the network (scores)"


@pytest.mark.parametrize(("name", "make"), [("state", KeyValueCache), ("past_key_values", lambda x: ((x, x),))])
def test_a_cache_for_the_next_call_says_what_it_is_and_how_to_do_without(name: str, make: Any) -> None:
    class Cached(Net):
        def forward(self, x: Tensor) -> Any:
            scores, features = super().forward(x)
            return {"scores": scores, name: features}

    reason = inspect(Cached(make).eval(), torch.randn(2, 3, 6, 6))["a"].reason
    assert reason is not None
    assert reason.startswith(f"output of the network ({name}: the cache for a next call; ")
    assert "use_cache=False" in reason


def test_what_was_not_looked_into_is_in_the_warnings() -> None:
    graph = inspect(Net(lambda x: x.detach().numpy()), torch.randn(2, 3, 6, 6))
    assert any("the output holds ndarray" in warning for warning in graph.warnings)


def test_an_output_of_nothing_that_opens_says_what_it_holds() -> None:
    class Arrays(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return [x.numpy()]

    with pytest.raises(ModelError, match=r"returns no tensor .* but a list that holds ndarray"):
        Inputs((A,)).call(Arrays())


def test_outputs_of_another_length_are_refused_where_rows_are_compared() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    with pytest.raises(ModelError, match=r"2 rows, one for each image, got shape \(\)"):
        output_rows(Mean(), torch.zeros(2, 3))
