"""What a calibration knows of the original network is found when it is first asked for, and once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import intrafusion
import intrafusion.restore.calibration as calibration_module
from intrafusion import ChannelGraph, ModelError, Recipe
from intrafusion.errors import RecipeError
from intrafusion.network.inputs import Inputs
from intrafusion.observe.moments import measure_moments
from intrafusion.restore import Noise, Synthesis, calibrate
from intrafusion.restore.steps import calibrate_for

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = Noise(images=16)


def network(*, norm: bool = True) -> tuple[nn.Sequential, ChannelGraph]:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(8)] if norm else []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3))
    return model.eval(), intrafusion.inspect(model.eval(), X)


def count_passes(model: nn.Module) -> list[int]:
    """Grows with every call of the network or of a copy of it."""
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_moments_are_measured_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = network()
    asked: list[ChannelGraph] = []

    def measure(model: nn.Module, graph: ChannelGraph, *args: object, **options: int) -> object:
        asked.append(graph)
        return measure_moments(model, graph, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration_module, "measure_moments", measure)
    found = calibrate(model, Inputs.of(X), "images", IMAGES)
    assert found.reference is found.original
    assert found.original.get_submodule("0").weight.data_ptr() == model[0].weight.data_ptr()  # type: ignore[operator]
    assert asked == []
    first = found.moments_of(graph)
    assert found.moments_of(graph) is first
    assert asked == [graph]
    other = intrafusion.inspect(model, X)
    assert found.moments_of(other) is not first
    assert asked == [graph, other]


def test_moments_on_images_are_those_of_the_images() -> None:
    model, graph = network()
    found = calibrate(model, Inputs.of(X), "images", IMAGES).moments_of(graph)
    with torch.no_grad():
        read = model[2](model[1](model[0](IMAGES))).movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(found["0"].means[0], read.mean(0), atol=1e-5, rtol=1e-5)


def test_on_noise_one_pass_gives_moments_and_reference_in_either_order() -> None:
    model, graph = network()
    calls = count_passes(model)
    found = calibrate(model, Inputs.of(X), "noise", noise=NOISE)
    calls.clear()  # by which it was found what the images run along
    moments, reference = found.moments_of(graph), found.reference
    assert len(calls) == 1
    assert reference is not model
    norm = reference.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        given = model[0](found.images.join().tensors()[0])
    torch.testing.assert_close(norm.running_mean, given.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)

    again = calibrate(model, Inputs.of(X), "noise", noise=NOISE)
    kept = again.reference
    for name, one in again.moments_of(graph).items():
        assert torch.equal(one.covariances, moments[name].covariances)
    assert again.reference is kept


class OneAtATime(nn.Module):
    """Takes a single image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)).reshape(1, 6))


def test_a_network_that_runs_on_no_noise_is_given_up_unless_noise_was_asked_for() -> None:
    model = OneAtATime().eval()
    graph, inputs = intrafusion.inspect(model, X), Inputs.of(X)
    assert calibrate_for(model, graph, inputs, Recipe.of(keep=0.5, restore="auto")) is None
    assert calibrate_for(model, graph, inputs, Recipe.of(keep=0.5, restore=None)) is None
    with pytest.raises(ModelError):
        intrafusion.compress(model, X, 0.5, restore="noise")


def test_a_fault_that_inputs_are_not_to_blame_for_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise ModelError("something else")

    model, graph = network(norm=False)
    monkeypatch.setattr(calibration_module, "measure_moments", fail)
    with pytest.raises(ModelError, match="something else"):
        calibrate_for(model, graph, Inputs.of(X), Recipe.of(keep=0.5, restore="auto"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 0.5, "reducer": "pivot"}, True),
        ({"keep": 0.5, "reducer": "select"}, False),
        ({"target": {"params": 0.5}, "reducer": "select"}, True),
    ],
)
def test_which_recipes_look_at_moments(options: dict, expected: bool) -> None:
    assert Recipe.of(**options).needs_moments is expected


def test_where_images_that_are_made_go_is_told() -> None:
    model, _ = network()
    told = [
        calibrate(model, Inputs.of(X), "synthetic", synthesis=Synthesis(images=n, steps=1, mirrored=m)).explain_counts()
        for n, m in ((50, True), (50, False), (8, True))
    ]
    assert told == [
        "50 were made: 40 and their mirror images to solve on, 10 to measure on",
        "50 were made: 40 to solve on, 10 to measure on",
        "8 were made: 8 and their mirror images to solve on",
    ]
    assert calibrate(model, Inputs.of(X), "images", IMAGES).explain_counts() is None


def test_making_images_keeps_within_the_memory() -> None:
    model, _ = network()
    found = list[int]()
    model.register_forward_pre_hook(lambda _, given: found.append(len(given[0])))
    how = {"synthesis": Synthesis(images=40, steps=2)}
    whole = calibrate(model, Inputs.of(X), "synthetic", **how).images.join()  # type: ignore[arg-type]
    assert max(found) == 40
    found.clear()
    parts = calibrate(model, Inputs.of(X), "synthetic", memory=100_000, **how).images.join()  # type: ignore[arg-type]
    assert 1 < max(found) < 40
    torch.testing.assert_close(parts.args[0], whole.args[0], atol=1e-3, rtol=1e-3)


def test_auto_takes_noise_where_memory_is_too_little_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RecipeError("memory: expected at least 5 GB, as making one image from the network takes that.")

    monkeypatch.setattr(calibration_module, "_make_images", refuse)
    found = calibrate(network()[0], Inputs.of(X), synthesis=Synthesis(images=20, steps=2))
    assert (found.level, found.why) == (
        "noise",
        "no images were given, and none could be made: memory: expected at least 5 GB, as making one image from the "
        "network takes that.",
    )
