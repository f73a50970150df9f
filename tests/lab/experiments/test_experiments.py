"""Each experiment measures what it says: its numbers are those of the library called by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import intrafusion
from intrafusion.lab import zoo
from intrafusion.lab.bench import read_records
from intrafusion.lab.bench.records import INNER, WHOLE, Record
from intrafusion.lab.experiments import EXPERIMENTS, Subject, get_experiment, run_experiment
from intrafusion.lab.experiments.subject import fingerprint
from intrafusion.lab.report.figures import figures
from intrafusion.lab.report.records import tables
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.drift import drift
from intrafusion.network.inputs import Inputs
from intrafusion.pipeline import follow
from intrafusion.recipe import Recipe
from intrafusion.restore import calibrate


def ran(name: str, subjects, folder, **options) -> list[Record]:
    experiment = EXPERIMENTS[name]
    return run_experiment(name, experiment, subjects, replace(experiment.defaults, **options), folder / f"{name}.jsonl")


def by_hand(digits: Subject, keep: float, reducer: str, **options) -> intrafusion.Compressed:
    """The criteria see norms folded, as in the paper."""
    example = zoo.example_input("digits_resnet")
    options = {"importance": {"name": "l1", "folded": True}, "restore": None, **options}
    return intrafusion.compress(digits.model, example, keep, reducer=reducer, **options)


@pytest.mark.slow
def test_data_free_measures_every_group_alone(digits, tmp_path):
    records = ran("data-free", [digits], tmp_path, keep=(0.5,), criterion=("l2",))
    groups = [g.name for g in digits.groups()]
    assert len(groups) == len(digits.graph.reducible) == 6
    assert [g.depth for g in digits.groups()] == sorted(g.depth for g in digits.graph.reducible)
    assert [(r.setting["group"], r.setting["criterion"], r.setting["method"]) for r in records[1:]] == [
        (group, "l2", method) for group in groups for method in ("select", "intrafusion", "pivot+noise")
    ]
    assert records[0].result["accuracy"] == accuracy(digits.model, digits.test.images, digits.test.labels)
    group = digits.graph[groups[2]]
    found = next(r for r in records if r.setting["group"] == group.name and r.setting["method"] == "intrafusion")
    small = by_hand(digits, 0.5, "intrafusion", include=group.producers[0], importance={"name": "l2", "folded": True})
    assert found.result["accuracy"] == accuracy(small.model, digits.test.images, digits.test.labels)
    assert (found.result["params"], found.result["macs"]) == (small.after.params, small.after.macs)
    assert found.result["sizes"] == {group.name: [group.size, group.size // 2]}
    assert Recipe.from_yaml(found.result["recipe"]).to_yaml() == small.plan.recipe.to_yaml()


def test_whole_model_with_a_step_against_the_loss(digits, tmp_path):
    records = ran(
        "whole-model", [digits], tmp_path, keep=(0.7,), method=("select", "select+least_squares"), group=(WHOLE, INNER)
    )
    found = {(r.setting["group"], r.setting["method"]): r.result["accuracy"] for r in records}
    bare = by_hand(digits, 0.7, "select")
    assert found[WHOLE, "select"] == accuracy(bare.model, digits.test.images, digits.test.labels)
    solved = by_hand(digits, 0.7, "select", restore="least_squares", images=digits.labelled())
    assert found[WHOLE, "select+least_squares"] == accuracy(solved.model, digits.test.images, digits.test.labels)
    assert found[WHOLE, "select+least_squares"] > found[WHOLE, "select"] + 0.2
    assert found[INNER, "select"] > found[WHOLE, "select"]


def test_random_importance_draws_anew_for_each_seed(digits, tmp_path):
    records = ran("random-importance", [digits], tmp_path, keep=(0.5,), group=(WHOLE,), seeds=3, method=("select",))
    kept = [Recipe.from_yaml(r.result["recipe"]).importance for r in records[1:]]
    assert [r.setting["seed"] for r in records[1:]] == [0, 1, 2] == [k.seed for k in kept]
    assert len({r.result["accuracy"] for r in records[1:]}) > 1


def test_marginals_compares_networks(digits, tmp_path):
    other = replace(digits, name="other", model=zoo.build("digits_resnet", seed=5))
    group = digits.groups()[0].name
    records = ran("marginals", [digits, other], tmp_path, keep=(0.5,), group=(group,))
    assert {r.setting["network"] for r in records} == {"digits", "other"}
    assert len({r.setting["method"] for r in records}) == 7  # the original and six choices
    assert len(records) == 14
    with pytest.raises(ValueError, match="two or more networks"):
        ran("marginals", [digits], tmp_path)
    with pytest.raises(ValueError, match="two networks are called 'digits'"):
        ran("marginals", [digits, digits], tmp_path)


def test_output_drift_counts_every_image(digits, tmp_path):
    paper = ("select", "intrafusion")
    records = ran("output-drift", [digits], tmp_path, keep=(0.7, 0.3), group=(WHOLE,), method=paper)
    for record in records:
        small = by_hand(digits, record.setting["keep"], record.setting["method"])
        distances = drift(small.model, digits.model, digits.test.images)
        assert record.result["mean"] == pytest.approx(float(distances.mean()), rel=1e-6)
        assert sum(record.result["counts"]) == len(digits.test) == 100
        below = sum(record.result["counts"][: len(record.result["edges"]) // 2])
        assert below == int((distances < record.result["edges"][len(record.result["edges"]) // 2]).sum())
    assert records[0].result["edges"] == records[-1].result["edges"]


def test_landscape_shows_the_three_networks_at_its_corners(digits, tmp_path):
    from intrafusion.lab.experiments import landscape

    records = ran("landscape", [digits], tmp_path, points=3)
    assert [r.setting["row"] for r in records] == [0, 1, 2]
    assert [len(r.result["accuracy"]) for r in records] == [3, 3, 3]
    options = {k: v for k, v in records[0].setting.items() if k not in ("row", *digits.setting)}
    plane, _ = landscape.plane_of(digits, **options)
    small = [digits.model, by_hand(digits, 0.7, "select").model, by_hand(digits, 0.7, "intrafusion").model]
    for (x, y), model in zip(plane.corners, small, strict=True):
        found = landscape.quality(digits, landscape.copy_with_tensors(digits.model, plane.at(x, y)))
        assert found[0] == pytest.approx(digits.accuracy(model), abs=0.011)  # float32: at most one image differs
    xs, ys = plane.axes(3)
    middle = landscape.quality(digits, landscape.copy_with_tensors(digits.model, plane.at(xs[1], ys[1])))
    assert (records[1].result["accuracy"][1], records[1].result["loss"][1]) == middle
    with pytest.raises(ValueError, match="two methods"):
        ran("landscape", [digits], tmp_path, method=("select",))


@pytest.mark.slow
def test_fine_tune_reduces_in_steps_and_trains(digits, tmp_path):
    before = fingerprint(digits.model)
    options = {"keep": (0.5,), "steps": 2, "step_epochs": 1, "epochs": 2, "lr": 0.02, "batch": 25}
    records = ran("fine-tune", [digits], tmp_path, **options)
    assert [r.setting["method"] for r in records] == ["original", "select", "intrafusion", "pivot+images"]
    assert records[3].result["accuracy_reduced"] > max(r.result["accuracy_reduced"] for r in records[1:3])
    for record in records[1:3]:
        stages = record.result["stages"]
        assert [(s["stage"], s["epoch"]) for s in stages] == [
            ("original", 0),
            ("step 1: reduced", 0),
            ("step 1: trained", 1),
            ("step 2: reduced", 1),
            ("fine-tuned", 2),
            ("fine-tuned", 3),
        ]
        assert stages[0]["accuracy"] == records[0].result["accuracy"]
        assert stages[-1]["accuracy"] == record.result["accuracy"] > record.result["accuracy_reduced"] + 0.2
        assert record.result["params"] == by_hand(digits, 0.5, "select").after.params
    assert fingerprint(digits.model) == before
    again = ran("fine-tune", [digits], tmp_path / "again", **options)
    assert [r.result for r in again] == [r.result for r in records]


def test_training_is_plain_sgd_with_a_rate_that_halves(digits):
    from intrafusion.lab.experiments.fine_tune import choose_training
    from intrafusion.train import train_

    data = zoo.load_data("digits_resnet", "train", limit=8)
    schedule = {"lr": 0.1, "halve_every": 2, "batch": 8}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    weight, bias = (p.detach().clone() for p in model.parameters())
    losses = [epoch.loss for epoch in train_(model, data, choose_training(schedule, 5, 0)).epochs]
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    x, target = data.images.flatten(1), torch.nn.functional.one_hot(data.labels, 10).float()
    for epoch, loss in enumerate(losses):
        p = torch.softmax(x @ weight.T + bias, 1)
        assert loss == pytest.approx(-float((target * p.log()).sum(1).mean()), rel=1e-4)
        for value, v, gradient in zip(
            (weight, bias), velocity, ((p - target).T @ x / 8, (p - target).mean(0)), strict=True
        ):
            v.mul_(0.9).add_(gradient)
            value -= 0.1 * 0.5 ** (epoch // 2) * v
    torch.testing.assert_close(model[1].weight.detach(), weight, rtol=1e-4, atol=1e-5)
    assert not model.training


def test_a_second_run_measures_nothing(digits, tmp_path, monkeypatch):
    first = ran("whole-model", [digits], tmp_path, keep=(0.9,))
    monkeypatch.setattr(Subject, "accuracy", lambda *_: pytest.fail("measured again"))
    assert ran("whole-model", [digits], tmp_path, keep=(0.9,)) == first
    assert len(read_records(tmp_path / "whole-model.jsonl")) == 4


@pytest.mark.parametrize("images", [True, False])
def test_our_default_stands_beside_the_method_of_the_paper(digits, tmp_path, images):
    subject = digits if images else replace(digits, train=None)
    *_, ours = ran("whole-model", [subject], tmp_path, keep=(0.7,))
    assert ours.setting["method"] == ("pivot+images" if images else "pivot+noise")
    given = {"restore": "images", "images": digits.labelled()} if images else {"restore": "noise"}
    recipe, example = Recipe.of(keep=0.7, restore=given["restore"]), Inputs.of(zoo.example_input("digits_resnet"))
    graph = intrafusion.inspect(digits.model, example)
    calibration = calibrate(digits.model, example, given["restore"], given.get("images"))  # all of the images
    small = follow(recipe, digits.model, graph, example, given.get("images"), calibration=calibration)
    assert ours.result["accuracy"] == accuracy(small.model, digits.test.images, digits.test.labels)
    (table,) = tables([ours])
    assert table.header[-1] == ("ours (default)" if images else "ours (default, on noise)")


def test_records_from_before_our_default_stay_and_are_drawn(digits, tmp_path):
    older = ran("whole-model", [digits], tmp_path, keep=(0.7,), method=("select", "intrafusion"))
    assert "ours (default)" not in tables(older)[0].header
    newer = ran("whole-model", [digits], tmp_path, keep=(0.7,))
    assert newer[:3] == older
    (table,) = tables([*older[1:2], *newer])
    assert table.header[-4:] == ("pruned", "fused", "ours (default)", "gain")
    assert "sizes" in figures(older)


def test_wrong_options_are_refused_before_anything_is_measured(digits, tmp_path):
    for option, message in (
        ({"criterion": ("l3",)}, "unknown importance 'l3'"),
        ({"order": "sideways"}, "unknown order 'sideways'"),
        ({"method": ("ourz",)}, "unknown reducer 'ourz'"),
    ):
        with pytest.raises(ValueError, match=message):
            ran("whole-model", [digits], tmp_path, **option)
    assert not list(tmp_path.iterdir())


def test_other_weights_are_another_subject(digits):
    other = replace(digits, model=zoo.build("digits_resnet", seed=9))
    assert other.setting["weights"] != digits.setting["weights"]
    assert replace(digits).setting == digits.setting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": ("layer9",)}, "unknown group 'layer9'.*Valid: .*whole network"),
        ({"method": ("selct",)}, "unknown reducer"),
    ],
)
def test_unknown_names_are_refused_before_the_work(digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ran("data-free", [digits], tmp_path, **options)
    assert not (tmp_path / "data-free.jsonl").exists()


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(ValueError, match="unknown experiment 'landscap'. Did you mean 'landscape'"):
        get_experiment("landscap")


def test_a_criterion_that_looks_at_images_wants_training_images(digits, tmp_path):
    blind = replace(digits, train=None)
    with pytest.raises(intrafusion.errors.IntrafusionError, match="training images are wanted"):
        ran("whole-model", [blind], tmp_path, keep=(0.7,), criterion=("taylor",))
    records = ran("whole-model", [digits], tmp_path, keep=(0.7,), criterion=("taylor",))
    assert records[-1].result["accuracy"] > records[1].result["accuracy"]


def test_a_keep_that_is_no_fraction_is_refused():
    with pytest.raises(ValueError, match=r"fractions in \(0, 1\], got 0"):
        replace(EXPERIMENTS["data-free"].defaults, keep=(0.5, 0))
