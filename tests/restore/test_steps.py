"""Which level is chosen, in which order restorers run, and what the report says of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from bare import compress
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import intrafusion
import intrafusion.restore.calibration as calibration_module
from intrafusion.compressed import Restoration
from intrafusion.errors import IntrafusionWarning, ModelError, RecipeError
from intrafusion.measure.closeness import Closeness, Yardstick
from intrafusion.restore import LeastSquares, Noise, Reestimate, Synthesis, calibrate
from intrafusion.restore import steps as steps_module
from intrafusion.restore.noise import standardise
from intrafusion.restore.synthesize import find_mismatch

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(8)] if norm else []
    parts = [nn.Conv2d(3, 8, 3), *middle, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3)]
    return nn.Sequential(*parts).eval()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.embed(x))))


def test_auto_takes_the_images_that_are_given_also_from_a_generator() -> None:
    small = intrafusion.compress(network(), X, 0.5, images=(IMAGES[i : i + 10] for i in range(0, 40, 10)))
    (step,) = small.restored
    assert (step.step, step.on) == ("LeastSquares", "40 images")
    assert step.error_before is not None
    assert step.error_after is not None
    assert step.error_after < step.error_before
    assert f"output error {step.error_before:.2g} -> {step.error_after:.2g}" in str(small)
    assert small.images is not None
    assert torch.equal(small.images.join().tensors()[0], IMAGES)


def test_auto_makes_images_where_it_can_afford_to(monkeypatch: pytest.MonkeyPatch) -> None:
    synthesis = calibration_module.Synthesis
    monkeypatch.setattr(calibration_module, "Synthesis", lambda **options: synthesis(images=8, steps=2, **options))
    monkeypatch.setattr(calibration_module, "_NEARER", math.inf)  # in two steps they come nearer to nothing
    (step,) = intrafusion.compress(network(), X, 0.5).restored
    assert (step.step, step.on, step.note) == (
        "LeastSquares",
        "16 images made from the network",
        "no images were given; 8 were made: 8 and their mirror images to solve on",
    )
    monkeypatch.setattr(calibration_module, "AFFORDABLE", 0.0)
    with pytest.warns(IntrafusionWarning, match="Better: images=, a few hundred") as warned:
        (step,) = intrafusion.compress(network(), X, 0.5).restored
    assert warned[0].filename == __file__
    assert (step.step, step.on) == ("Noise", "512 noise images")
    assert "making images from the network is left out: 8 in 2 steps would take about 0 s here" in str(step.note)


@pytest.mark.parametrize(("bright", "level"), [(0.0, "noise"), (5.0, "synthetic")])
def test_auto_makes_images_only_where_noise_is_far_from_what_norms_remember(bright: float, level: str) -> None:
    """Norms that remember other noise of the kind, or such noise far brighter."""
    data = Noise(images=64, seed=7).make(X).map(lambda t: t + bright)
    model, synthesis = standardise(network(), data), Synthesis(images=60, steps=60)
    found = calibrate(model, X, synthesis=synthesis)
    assert found.level == level
    if level == "synthetic":
        assert found.why == "no images were given"
        return
    made = calibrate(model, X, "synthetic", synthesis=synthesis).images.join()
    noise = Noise(images=96).make(X)
    off, noisy = (find_mismatch(model, images) for images in (made, noise))
    assert off > 0.3 * noisy
    said = f"images made from the network are {off:.2g} off what its batch norms remember, noise is {noisy:.2g}"
    assert found.why == f"no images were given; {said}"


def test_a_choice_of_channels_alone_takes_a_few_noise_images() -> None:
    bare = intrafusion.compress(network(), X, 0.5, restore=None)
    assert bare.restored == ()
    assert bare.images is not None
    assert len(bare.images.join().tensors()[0]) == steps_module.ENOUGH_TO_CHOOSE


def test_auto_without_norms_takes_noise() -> None:
    (step,) = intrafusion.compress(network(norm=False), X, 0.5).restored
    assert step.step == "Noise"
    assert "without batch norms images that are made keep no more" in str(step.note)


class Two(nn.Module):
    """Reads two tensors: what an image of it would be is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x + y)))


def test_auto_says_where_nothing_can_be_done() -> None:
    small = intrafusion.compress(Two().eval(), (torch.ones(2, 6), torch.ones(2, 6)), 0.5)
    assert small.restored == ()
    assert "note: not restored: no images were given" in str(small)
    assert small.plan.sizes == {"a": 4}


def test_tokens_are_restored_on_tokens() -> None:
    tokens = torch.arange(45).reshape(9, 5) % 9
    small = intrafusion.compress(Tokens().eval(), tokens[:2], {"a": 0.5}, reducer="select", images=tokens)
    (step,) = small.restored
    assert step.error_after is not None
    assert step.error_before is not None
    assert step.error_after < 0.5 * step.error_before


def test_restorers_run_in_order_and_each_says_what_it_gained() -> None:
    small = compress(network(), X, 0.5, restore=["reestimate", LeastSquares(rows=300)], images=IMAGES)
    assert [step.step for step in small.restored] == ["Reestimate", "LeastSquares"]
    assert small.plan.recipe.restore == (Reestimate(), LeastSquares(rows=300))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"restore": "images"}, ModelError, 'restore="images": expected images=, got none'),
        ({"restore": "least_squares"}, ModelError, "LeastSquares needs images"),
        ({"restore": "least_square"}, ValueError, "unknown restorer 'least_square'. Did you mean 'least_squares'?"),
        (
            {"restore": {"name": "least_squares", "row": 3}},
            RecipeError,
            "unknown hyper-parameter 'row'. Did you mean 'row",
        ),
        ({"restore": 3}, RecipeError, "restorer: expected a name, a mapping with a name or an object"),
        ({"restore": ["auto", "noise"]}, ValueError, "expected at most one of auto"),
        ({"images": 3}, ModelError, "images: expected a tensor"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        intrafusion.compress(network(), X, 0.5, **options)


@dataclass(frozen=True)
class Worse(LeastSquares):
    """Writes sevens: by any measure, on any inputs, the outputs are worse."""

    def __call__(self, compressed, reference, graph, images):
        for parameter in compressed.model.parameters():
            parameter.data.fill_(7.0)


def test_a_level_that_makes_the_outputs_worse_is_undone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = intrafusion.compress(network(), X, 0.8, restore=None, images=IMAGES)
    monkeypatch.setattr(calibration_module, "LeastSquares", Worse)
    small = intrafusion.compress(network(), X, 0.8, images=IMAGES)
    (step,) = small.restored
    assert step.note == "undone, as the outputs were worse"
    assert step.error_after > step.error_before
    assert "(undone, as the outputs were worse)" in " ".join(str(small).split())
    for name, tensor in bare.model.state_dict().items():
        assert torch.equal(small.model.state_dict()[name], tensor)


def test_noise_is_measured_with_its_own_statistics_in_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ridge of images: that of noise fits the noise less."""
    monkeypatch.setattr(steps_module, "Noise", partial(Noise, scarcity=LeastSquares().scarcity))
    (step,) = intrafusion.compress(network(), X, 0.5, restore="noise").restored
    assert step.error_after < 0.8 * step.error_before
    assert (step.measured_on, step.unseen) == ("64 noise images", True)
    (closed, noise) = intrafusion.compress(network(), X, 0.5, restore=["closed_form", "noise"]).restored
    assert (closed.on, closed.error_before) == (None, None)
    assert noise.error_after == pytest.approx(step.error_after)


def test_a_network_without_a_number_before_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def restored(*errors: float) -> Restoration:
        found = iter([*errors, 0.0])
        monkeypatch.setattr(Yardstick, "measure", lambda *_: Closeness(next(found)))
        return intrafusion.compress(network(), X, 0.8, images=IMAGES).restored[0]

    assert restored(float("nan"), 0.5).note is None
    assert restored(0.5, float("nan")).note == "undone, as the outputs were worse"


def test_images_from_the_network_that_do_harm_give_way_to_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(calibration_module.Synthesis):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{"images": 50, "steps": 2, **options})

    monkeypatch.setattr(calibration_module, "AFFORDABLE", 1e9)
    monkeypatch.setattr(calibration_module, "_NEARER", math.inf)
    monkeypatch.setattr(calibration_module, "Synthesis", Small)
    monkeypatch.setattr(calibration_module, "LeastSquares", Worse)
    made, noise = intrafusion.compress(network(), X, 0.5).restored
    assert (made.step, made.on, made.undone) == ("Worse", "80 images made from the network", True)
    assert (noise.step, noise.on) == ("Noise", "512 noise images")
    assert made.measured_on == noise.measured_on == "10 images made from the network"
    assert "; 50 were made: 40 and their mirror images to solve on, 10 to measure on; undone" in str(made.note)
    assert made.unseen
    assert noise.error_before == made.error_before
    assert str(noise.note).startswith("in place of the step before")
    assert noise.undone is (noise.error_after > noise.error_before)


def test_noise_is_undone_by_images_at_hand_that_it_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "restore", lambda self, small, *_: [p.data.zero_() for p in small.model.parameters()])
    small = intrafusion.compress(network(), X, 0.8, restore="noise", images=torch.cat([IMAGES, IMAGES + 1]))
    (step,) = small.restored
    assert (step.measured_on, step.unseen, step.undone) == ("16 images", True, True)
    assert step.result is not None
    assert step.result[0] == step.result[1]
    assert bool(small.model.get_parameter("0.weight").any())


def test_long_work_on_noise_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "AFFORDABLE", 0.0)
    with pytest.warns(
        IntrafusionWarning, match="solving the layers on [0-9]+ noise images takes about [0-9]+ s here. Better: inputs="
    ):
        intrafusion.compress(network(norm=False), X, 0.5)


class Members(nn.Module):
    """Networks of one kind that run as one, and a layer behind them; all with `torch.func`."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2))
        self.last = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)) if reads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tensors, _ = stack_module_state(list(self.members))
        found = torch.vmap(lambda own: functional_call(self.members[0], own, (x,)))(tensors)
        return self.last(torch.cat(list(found), 1))


def test_layers_in_a_transform_are_left_as_they_are_and_that_is_said() -> None:
    """One row stands for all there, and the weights are copies."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    (idle,) = intrafusion.compress(Members(reads=False).eval(), x[:2], 0.5, inputs=x).restored
    assert "it changed nothing" in (idle.note or "")
    small = intrafusion.compress(Members(reads=True).eval(), x[:2], 0.5, reducer="select", inputs=x)
    (solved,) = small.restored
    assert "it changed nothing" not in (solved.note or "")
    assert solved.error_after is not None
    assert solved.error_before is not None
    assert solved.error_after < solved.error_before
