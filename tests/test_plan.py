from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import compress
from torch import Tensor, nn

from intrafusion import IntraFusion, Plan, PlanError, Recipe, apply, decide, inspect
from intrafusion.io.folder import load_plan, save_plan


def network(width: int = 8, hidden: str = "body") -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, width, 3),
        "norm": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        hidden: nn.Conv2d(width, 6, 3),
        "tanh": nn.Tanh(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(6, 2),
    }
    return nn.Sequential(OrderedDict(layers)).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_of(model: nn.Module, **options: Any) -> Plan:
    bare = {"keep": 0.5, "reducer": "intrafusion", "restore": None}
    return decide(model, inspect(model, X), Recipe.of(**bare | options))


def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return state(a).keys() == state(b).keys() and all(torch.equal(state(a)[k], state(b)[k]) for k in state(a))


def test_json_gives_the_same_plan() -> None:
    plan = plan_of(network(), reducer=IntraFusion("function", p=2.0), exclude=["body:outputs"])
    again = Plan.from_json(plan.to_json(), plan.maps)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert plan.sizes == {"stem": 4}


@pytest.mark.parametrize(
    "change",
    [{"recipe": Recipe(seed=5)}, {"warnings": ("x",)}, {"maps": {}}, {"shapes": {}}, {"decisions": ()}],
)
def test_plans_that_differ_are_not_equal(change: dict[str, Any]) -> None:
    plan = plan_of(network())
    assert replace(plan, **change) != plan
    assert plan != "a plan"


def test_plans_with_other_maps_are_not_equal() -> None:
    plan = plan_of(network())
    other = {k: replace(v, merge=v.merge + 1e-12) for k, v in plan.maps.items()}
    assert replace(plan, maps=other) != plan


def test_saved_loaded_and_applied_gives_the_same_bytes(tmp_path: Path) -> None:
    model = network()
    plan = plan_of(model)
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert loaded == plan
    found, expected = apply(model, loaded, X), compress(model, X, 0.5)
    assert same_state(found.model, expected.model)
    assert found.plan == expected.plan == plan
    inspected = apply(model, loaded, X, graph=inspect(model, X))
    assert same_state(inspected.model, expected.model)
    assert inspected.plan == plan
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == ["maps.safetensors", "plan.json", "recipe.yaml"]


def own_score(group: Any, weights: Any, observations: Any = None) -> Tensor:
    return torch.arange(group.size).double()


def test_a_plan_with_a_method_of_the_user_can_be_loaded_and_applied(tmp_path: Path) -> None:
    model = network()
    plan = plan_of(model, importance=own_score)
    save_plan(plan, tmp_path / "plan")
    assert load_plan(tmp_path / "plan") == plan
    kept = apply(model, load_plan(tmp_path / "plan"), X).model
    assert same_state(kept, compress(model, X, 0.5, importance=own_score).model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(10), r"'stem.weight' is \[8, 3, 3, 3\] there and \[10, 3, 3, 3\] here"),
        (network(hidden="trunk"), r"it has 'body.weight' \[6, 8, 3, 3\], this one has no such tensor"),
        (
            nn.Sequential(OrderedDict([*network().named_children(), ("more", nn.Linear(2, 2))])),
            "this one has 'more.bias'",
        ),
    ],
)
def test_a_plan_for_another_network(other: nn.Module, message: str) -> None:
    with pytest.raises(PlanError, match=f"the plan is for another network: {message}"):
        apply(other, plan_of(network()), X)


def test_a_plan_for_other_groups_of_the_same_shapes() -> None:
    """The same tensors, but nothing is normalised."""

    class Other(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[7](self[5](self[3](self[0](input).relu()).tanh()).flatten(1))

    with pytest.raises(PlanError, match="group 'stem' is not the same here"):
        apply(Other(OrderedDict(network().named_children())).eval(), plan_of(network()), X)


def test_rolled_back_groups_lose_their_map_and_say_why() -> None:
    plan = plan_of(network()).rolled_back({"stem": "it broke"})
    assert set(plan.maps) == {"body"}
    stem = plan.decisions[0]
    assert (stem.group, stem.n, stem.m, stem.reason, stem.reduced) == ("stem", 8, 8, "it broke", False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": "x"}', "null"])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match="this is not a plan of intrafusion"):
        Plan.from_json(text)


def test_a_plan_of_a_later_version() -> None:
    data = json.loads(plan_of(network()).to_json()) | {"format": 99}
    with pytest.raises(PlanError, match="the plan has format 99, this version reads up to 2; upgrade intrafusion"):
        Plan.from_json(json.dumps(data))


def test_deciding_writes_nothing() -> None:
    model = network()
    before = {k: v.clone() for k, v in state(model).items()}
    plan_of(model, order="backward")
    assert all(torch.equal(before[k], v) for k, v in state(model).items())


class _OnGraph(nn.Module):
    """Two layers around a constant matrix, whose rows and columns no channel runs along."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("graph", torch.rand(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave((self.graph @ self.enter(x)).tanh())


def test_dimensions_without_channels_are_in_the_plan() -> None:
    model, x = _OnGraph(), torch.randn(5, 4)
    plan = decide(model, inspect(model, x), Recipe(keep=0.5, restore=()), x)
    kept = {d.members: d.m for d in plan.decisions}
    assert kept["graph[0]",] == kept["graph[1]",] == 5
    assert [d.m for d in plan.decisions if d.group == "enter"] == [3]
