"""The order "forward": channels chosen in turn, each as it is read in the network that the choices before it left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import Recipe, RecipeError, compress
from intrafusion.pipeline import follow
from intrafusion.restore import calibrate


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


X = torch.zeros(1, 3, 10, 10)
IMAGES = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def test_each_group_is_chosen_in_the_network_in_which_those_before_are_fewer_and_solved() -> None:
    model = chain()
    graph = intrafusion.inspect(model, X)
    calibration = calibrate(model, X, "images", IMAGES)
    small = follow(Recipe.of(keep=0.5, order="forward"), model, graph, X, calibration=calibration)

    names, maps = [d.group for d in small.plan.decisions if d.reduced], {}
    current = model
    for name in names:
        known = calibration.seen_by(current)
        found = intrafusion.decide(
            current, intrafusion.inspect(current, X), Recipe.of(keep={name: 0.5}), X, calibration=known
        )
        maps[name] = found.maps[name]
        part = intrafusion.decide(model, graph, Recipe.of(keep=0.5), X, calibration=calibration)
        part = replace(part.rolled_back({n: "not yet" for n in names if n not in maps}), maps=dict(maps))
        step = intrafusion.apply(model, part, X, graph=graph)
        calibration.restore(step, model, graph, lambda _: None)
        current = step.model
    assert len(names) == 3
    for name in names:
        torch.testing.assert_close(small.plan.maps[name].merge, maps[name].merge)
        torch.testing.assert_close(small.plan.maps[name].unmerge, maps[name].unmerge)
    joint = follow(Recipe.of(keep=0.5), model, graph, X, calibration=calibration)
    assert joint.plan.sizes == small.plan.sizes
    assert any(not torch.allclose(joint.plan.maps[n].unmerge, maps[n].unmerge) for n in names)


def test_sizes_of_a_target_stay_and_what_was_asked_for_is_what_the_plan_says() -> None:
    asked: dict[str, Any] = dict(target={"macs": 0.6}, inputs=IMAGES, progress=False)
    forward, joint = compress(chain(), X, order="forward", **asked), compress(chain(), X, **asked)
    assert forward.plan.sizes == joint.plan.sizes
    assert forward.plan.recipe == Recipe.of(target={"macs": 0.6}, order="forward")


def test_the_winner_of_several_candidates_is_chosen_in_turn() -> None:
    small = compress(chain(), X, 0.5, inputs=IMAGES, reducer="auto", order="forward", progress=False)
    assert small.plan.recipe.order == "forward"
    told = [note for note in small.plan.warnings if "reducer auto" in note]
    assert len(told) == 1
    assert "off by" in told[0]


@pytest.mark.parametrize("options", [{"restore": None}, {"restore": "closed_form", "reducer": "intrafusion"}])
def test_where_no_layers_are_solved_it_is_said_and_the_choice_is_the_joint_one(options: dict[str, Any]) -> None:
    small = compress(chain(), X, 0.5, order="forward", progress=False, **options)
    joint = compress(chain(), X, 0.5, progress=False, **options)
    assert any("order forward: channels were chosen as with joint" in note for note in small.plan.warnings)
    assert all(torch.equal(small.plan.maps[n].merge, joint.plan.maps[n].merge) for n in joint.plan.maps)


def test_without_data_it_works_on_noise() -> None:
    small = compress(chain(), X, 0.5, order="forward", restore="noise", progress=False)
    assert set(small.plan.sizes.values()) == {4, 3}
    assert not any("order forward" in note for note in small.plan.warnings)


def test_a_stream_of_a_transformer_is_rotated_in_its_turn() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3))
    x, tokens = torch.zeros(1, 4, 5), torch.randn(32, 4, 5)
    small = compress(model.eval(), x, 0.5, inputs=tokens, order="forward", progress=False)
    joint = compress(model, x, 0.5, inputs=tokens, progress=False)
    assert small.plan.sizes == joint.plan.sizes
    assert {d.group: d.mixing for d in small.plan.decisions} == {d.group: d.mixing for d in joint.plan.decisions}


def test_groups_that_keep_one_size_have_one_turn() -> None:
    """Twins of a grouped convolution: some of them smaller, and others not yet, was no network."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    small = compress(model, X, 0.5, inputs=IMAGES, order="forward", progress=False)
    assert not small.rolled_back
    assert small.plan.sizes == compress(model, X, 0.5, inputs=IMAGES, progress=False).plan.sizes


def test_what_does_not_go_with_it_is_refused() -> None:
    model = chain()
    with pytest.raises(RecipeError, match="ranks: goes without order='forward'"):
        compress(model, X, order="forward", ranks=0.5)
    with pytest.raises(RecipeError, match=r"compress\(..., order='forward'\)"):
        intrafusion.decide(model, intrafusion.inspect(model, X), Recipe.of(order="forward"), X)
