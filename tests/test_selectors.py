from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from intrafusion import BudgetError, inputs_of, outputs_of
from intrafusion.graph import ChannelGraph
from intrafusion.selectors import Selector, as_selectors, find_left_alone
from intrafusion.trace import trace


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, ChannelGraph]:
    """features.0 -> features.2 -> classifier.0 -> classifier.2: three groups and the output."""
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    classifier = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model = nn.ModuleDict({"features": features, "classifier": classifier})
    model.forward = lambda x: classifier(features(x))  # type: ignore[method-assign, assignment]
    return model, trace(model, torch.randn(1, 3, 8, 8))


def reduced(network: tuple[nn.Module, ChannelGraph], include: Any = None, exclude: Any = None) -> list[str]:
    model, graph = network
    unwanted = find_left_alone(graph, model, as_selectors(include), as_selectors(exclude) or ())
    return [g.name for g in graph.reducible if g.name not in unwanted]


ALL = ["features.0", "features.2", "classifier.0"]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (None, ALL),
        ("features.0", ["features.0"]),
        ("features.*", ["features.0", "features.2"]),
        ("features", ["features.0", "features.2"]),
        ("*.0", ["features.0", "classifier.0"]),
        (nn.Linear, ["classifier.0"]),
        ((nn.Conv2d, "classifier.0"), ALL),
        (["features.0", "classifier.0"], ["features.0", "classifier.0"]),
        (lambda name, module: isinstance(module, nn.Conv2d) and module.out_channels > 6, ["features.0"]),
        ("features.2:outputs", ["features.2"]),
        ("features.2:inputs", ["features.0"]),
        (inputs_of("features.2"), ["features.0"]),
        (outputs_of("features.2"), ["features.2"]),
        (inputs_of(nn.Linear), ["features.2", "classifier.0"]),
        ("classifier:inputs", ["features.2", "classifier.0"]),
        ([], []),
    ],
)
def test_include(network: tuple[nn.Module, ChannelGraph], include: Any, expected: list[str]) -> None:
    assert reduced(network, include) == expected
    if include is not None:
        assert reduced(network, None, include) == [name for name in ALL if name not in expected]


def test_exclude_wins_over_include(network: tuple[nn.Module, ChannelGraph]) -> None:
    assert reduced(network, "features", "features.2") == ["features.0"]


def test_reasons(network: tuple[nn.Module, ChannelGraph]) -> None:
    model, graph = network
    found = find_left_alone(
        graph, model, as_selectors("features"), as_selectors([nn.Conv2d, "classifier.2:inputs"]) or ()
    )
    assert found["features.0"] == "excluded (Conv2d)"
    assert found["classifier.0"] == "excluded (classifier.2:inputs)"
    assert find_left_alone(graph, model, as_selectors("features"), ())["classifier.0"] == "not included"


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("features.1O", "clude: unknown layer 'features.1O'. Did you mean 'features.1'"),
        ("classifer", "Did you mean 'classifier'"),
        (nn.LSTM, r"no layer of the network is a LSTM; there are AdaptiveAvgPool2d, Conv2d, Flatten and \d more"),
        (inputs_of(nn.LSTM), "no layer of the network is a LSTM"),
        ("type:Conv2D", "unknown type of layer 'Conv2D'. Did you mean 'Conv2d'"),
        (lambda name, module: False, r"the function .*<lambda> says yes to none of the \d+ layers"),
    ],
)
def test_what_matches_nothing_is_an_error(network: tuple[nn.Module, ChannelGraph], selector: Any, message: str) -> None:
    for choice in ({"include": selector}, {"exclude": selector}):
        with pytest.raises(BudgetError, match=message) as raised:
            reduced(network, **choice)
        assert str(raised.value).startswith(f"{next(iter(choice))}: ")


@pytest.mark.parametrize("item", [3, ["a", None], 0.5])
def test_what_is_no_selector(item: Any) -> None:
    with pytest.raises(BudgetError, match="include/exclude: expected a name, a layer type or a function"):
        as_selectors(item)


def test_a_colon_is_a_side_only_where_it_names_one() -> None:
    assert as_selectors("a:b:inputs") == (Selector("a:b", "inputs"),)
    assert as_selectors("a:b") == (Selector("a:b", "outputs"),)


def test_text_of_a_selector_means_the_same() -> None:
    for selector in (inputs_of("a.*"), outputs_of("b")):
        assert as_selectors(str(selector)) == (selector,)
