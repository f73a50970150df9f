"""Distillation: nearer to the original on unseen inputs, or undone; what cannot be trained says so; goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.errors import ModelError, RecipeError
from intrafusion.restore import Distill, LeastSquares
from intrafusion.restore import distill as distill_module
from intrafusion.train import Training
from intrafusion.train.imitation import Imitation

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(1, 3, 8, 8, generator=GENERATOR)
IMAGES = torch.einsum(
    "np,pchw->nchw", torch.randn(60, 4, generator=GENERATOR), torch.randn(4, 3, 8, 8, generator=GENERATOR)
)
"""Of few patterns, so that some of them tell of the others."""

FEW = Distill(steps=60, lr=3e-3, views=False, batch=16)


class Wide(nn.Module):
    """Too many channels for a half of them to say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def wide() -> nn.Module:
    torch.manual_seed(0)
    model = Wide()
    model(IMAGES)  # the norm remembers something
    return model.eval()


def distilled(model: nn.Module, how: Any = FEW, inputs: Any = IMAGES, example: Any = X, **options: Any) -> Any:
    return intrafusion.compress(model, example, 0.5, inputs=inputs, restore=how, progress=False, **options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def is_same(a: nn.Module, b: nn.Module) -> bool:
    own, others = tensors(a), tensors(b)
    return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


def measure_error(small: nn.Module, model: nn.Module, images: Tensor) -> float:
    """By hand."""
    with torch.no_grad():
        expected = model(images).double()
        lost = (small(images).double() - expected).square().sum()
    return float(lost / (expected - expected.mean(0)).square().sum())


def watch_plans(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """How each training was to be."""
    plans, trained = list[Training](), distill_module.train_

    def watch(model: nn.Module, data: Any, how: Training, **options: Any) -> Any:
        plans.append(how)
        return trained(model, data, how, **options)

    monkeypatch.setattr(distill_module, "train_", watch)
    return plans


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_the_outputs_come_nearer_on_inputs_that_it_did_not_see() -> None:
    model = wide()
    solved, small = distilled(model, "auto"), distilled(model)
    first, last = small.restored
    assert (first.step, last.step, last.unseen, last.undone) == ("LeastSquares", "Distill", True, False)
    assert first.error_after == last.error_before == solved.restored[0].error_after
    held = IMAGES[torch.arange(2, 60, 5)]
    assert last.measured_on == "12 images"
    assert last.error_after == pytest.approx(measure_error(small.model, model, held), rel=1e-4)
    assert last.error_after < 0.9 * last.error_before
    assert last.note == "60 steps at a rate of 0.003 for outputs and what layers read"
    assert not torch.equal(small.model.first.weight, solved.model.first.weight)
    assert not any(p.grad is not None for p in small.model.parameters())


def test_the_layers_are_solved_before_it_unless_something_else_is() -> None:
    assert Recipe.of(restore="distill").restore == ("auto", Distill())
    assert Recipe.of(restore=["images", "distill"]).restore == ("images", Distill())
    assert Recipe.of(restore=["least_squares", FEW]).restore == (LeastSquares(), FEW)
    recipe = Recipe.of(restore={"name": "distill", "seconds": 20.0, "views": False})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.restore == ("auto", Distill(seconds=20.0, views=False))


def test_it_stands_in_what_is_saved_and_in_every_size(tmp_path: Path) -> None:
    model = wide()
    sizes = intrafusion.frontier(model, X, IMAGES, (0.7, 0.5), of="channels", restore=replace(FEW, steps=5))
    assert [p.compressed.restored[-1].step for p in sizes] == ["Distill", "Distill"]
    sizes[0].compressed.save(tmp_path / "small")
    data = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert data["restored"][-1]["note"].startswith("5 steps at a rate of 0.003")
    assert "5 steps at a rate" in (tmp_path / "small" / "README.md").read_text()
    assert is_same(intrafusion.load(tmp_path / "small", wide()), sizes[0].model)


@pytest.mark.parametrize(
    ("scores", "tried", "taken"),
    [
        ((-0.3, -0.4, -0.2), (3e-3, 1e-3), "0.003"),
        ((-0.5, -0.4, -0.6), (3e-3, 1e-3, 3e-4), "0.001"),
        ((-0.5, -0.4, -0.3), (3e-3, 1e-3, 3e-4), "0.0003"),
        ((-math.inf, -0.4, -0.5), (3e-3, 1e-3, 3e-4), "0.001"),
        ((-math.inf, -math.inf, -0.5), (3e-3, 1e-3, 3e-4), "0.0003"),
    ],
)
def test_the_rate_is_lowered_as_long_as_the_held_out_error_falls(
    scores: tuple[float, ...], tried: tuple[float, ...], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def try_out(self: Any, rate: float, imitation: Imitation, trial: nn.Module) -> float:
        seen.append(rate)
        return scores[len(seen) - 1]

    monkeypatch.setattr(distill_module._Run, "try_out", try_out)
    plans = watch_plans(monkeypatch)
    last = distilled(wide(), Distill(steps=4, seconds=100)).restored[-1]
    assert tuple(seen) == tried
    assert f"at a rate of {taken} for" in last.note
    assert plans[0].seconds == pytest.approx(100 * (1 - 0.05 * len(tried)))


def test_images_are_shown_in_other_views_unless_that_is_said() -> None:
    assert (
        "images mirrored, shifted, cut and mixed"
        in distilled(wide(), replace(FEW, views=True, steps=4)).restored[-1].note
    )
    assert "mirrored" not in distilled(wide(), replace(FEW, steps=4)).restored[-1].note


@pytest.mark.parametrize(
    ("batch", "memory", "moving"), [(16, None, True), (15, None, False), (48, 16, True), (48, 15, False)]
)
def test_norms_follow_what_large_batches_show(
    batch: int, memory: int | None, moving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of so many images where memory is short."""
    plans = watch_plans(monkeypatch)
    limit = distill_module._limit
    monkeypatch.setattr(distill_module, "_limit", lambda seen: replace(limit(seen), size=memory or limit(seen).size))
    model = wide()
    solved, small = distilled(model, "auto"), distilled(model, replace(FEW, batch=batch))
    assert not small.restored[-1].undone
    assert [how.norms for how in plans] == [moving]
    own, others = small.model.norm, solved.model.norm
    assert torch.equal(own.running_var, others.running_var) != moving
    assert torch.equal(own.running_mean, others.running_mean) != moving
    assert own.momentum == others.momentum


def test_what_norms_remember_is_near_to_what_they_read_then() -> None:
    """By hand, also where the network remembers slowly."""
    model = wide()
    model.norm.momentum = 0.001
    small = distilled(model, replace(FEW, steps=80, batch=48)).model
    read = small.first(IMAGES).detach()
    torch.testing.assert_close(small.norm.running_var, read.var((0, 2, 3)), rtol=0.25, atol=0)
    assert not torch.allclose(model.norm.running_var[:4], small.norm.running_var, rtol=0.25)


def test_rows_are_shown_in_no_other_views() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))
    rows = torch.randn(60, 6)
    last = distilled(model, replace(FEW, views=True), rows, rows[:1]).restored[-1]
    assert "mirrored" not in last.note
    assert last.error_after < last.error_before


def test_without_inputs_it_trains_on_images_made_from_the_network() -> None:
    restore = ["synthetic", replace(FEW, steps=20)]
    small = distilled(wide(), restore, None)
    last = small.restored[-1]
    assert (last.step, last.on) == ("Distill", "206 images made from the network")
    assert last.result[1].error <= last.error_before


def test_noise_is_nothing_to_train_on() -> None:
    small = distilled(wide(), ["noise", FEW], None)
    assert [step.step for step in small.restored] == ["Noise"]
    assert "not distilled: noise tells too little to train on; give inputs=" in str(small)


# ---- never worse ----------------------------------------------------------------------------------------------------


def test_weights_that_are_no_better_are_undone_and_said() -> None:
    model = wide()
    solved, small = distilled(model, "auto"), distilled(model, replace(FEW, lr=1.0, steps=3))
    last = small.restored[-1]
    assert last.undone
    assert last.error_after > last.error_before
    assert "undone, as the outputs were no better" in str(small)
    assert is_same(small.model, solved.model)


def test_one_that_diverges_is_undone_and_said() -> None:
    model = wide()
    solved, small = distilled(model, "auto"), distilled(model, replace(FEW, lr=1e30))
    assert small.restored[-1].undone
    assert "undone, as it diverged: train: the loss is" in small.restored[-1].note
    assert is_same(small.model, solved.model)


def test_nothing_is_trained_where_every_rate_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_module, "RATES", (1e30, 1e31))
    model = wide()
    small = distilled(model, Distill(steps=60, batch=16))
    assert "undone, as it diverged: train: the loss is" in small.restored[-1].note
    assert is_same(small.model, distilled(model, "auto").model)


# ---- any network ----------------------------------------------------------------------------------------------------


class Twice(Wide):
    """Two outputs by name, of which one is 1000 times as large."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return {"boxes": 1000 * scores[:, :2], "scale": scores[:, 2:].tanh(), "count": torch.arange(len(x))}


class Dropping(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.b(torch.tanh(3 * self.a(self.embed(input_ids) * attention_mask[..., None])))


def test_several_outputs_by_name() -> None:
    torch.manual_seed(0)
    last = distilled(Twice().eval()).restored[-1]
    assert last.outputs_before.keys() == {"boxes", "scale"}
    assert sum(last.outputs_after.values()) < sum(last.outputs_before.values())


def test_padded_tokens_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plans = watch_plans(monkeypatch)
    model = Tokens().eval()
    ids = torch.randint(0, 9, (60, 5))
    mask = (torch.arange(5) < torch.randint(2, 6, (60, 1))).long()
    example = {"input_ids": ids[:2], "attention_mask": mask[:2]}
    found = []
    for filler in (0, 8):
        filled = {"input_ids": ids.where(mask.bool(), filler), "attention_mask": mask}
        small = distilled(model, replace(FEW, steps=10), filled, example)
        found.append(small)
    assert found[0].restored[-1].error_after < found[0].restored[-1].error_before
    assert found[0].restored[-1].error_after == pytest.approx(found[1].restored[-1].error_after, rel=1e-4)
    assert [how.norms for how in plans] == [False, False]  # the statistics of a batch would be of these too


def test_half_precision_frozen_parameters_and_dropout_stay_what_they_were() -> None:
    torch.manual_seed(0)
    model = Dropping().eval().bfloat16()
    model.first.weight.requires_grad_(False)
    small = distilled(model, inputs=IMAGES.bfloat16(), example=X.bfloat16())
    last = small.restored[-1]
    assert not last.undone
    assert last.error_after < last.error_before
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in small.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(module.training for module in small.model.modules())


class Undifferentiated(Wide):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Rounded(Wide):
    """A way back that fails."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        y = self.last(self.second(x).relu().mean((2, 3)))
        x.detach().mul_(2)
        return y


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Undifferentiated, "not distilled: no gradient comes back to the parameters: the network's forward takes none"),
        (Rounded, "not distilled: the network cannot be differentiated: "),
    ],
)
def test_what_cannot_be_trained_keeps_what_was_solved(network: type[nn.Module], why: str) -> None:
    torch.manual_seed(0)
    model = network().eval()
    small = distilled(model)
    assert why in "\n".join(small.notes)
    assert [step.step for step in small.restored] == ["LeastSquares"]
    assert is_same(small.model, distilled(model, "auto").model)


def test_a_network_without_floating_point_parameters_is_refused() -> None:
    model = wide()
    graph = intrafusion.inspect(model, X)
    small = distilled(model, None)
    for module in small.model.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if parameter is None else parameter.detach())
    with pytest.raises(ModelError, match="distill: the network has no floating-point parameters to train; leave"):
        FEW(small, model, graph, IMAGES)


def test_a_single_input_cannot_be_kept_apart() -> None:
    model = wide()
    small = distilled(model, None)
    with pytest.raises(ModelError, match="distill: expected several inputs, to keep one apart to stop by, got 1 image"):
        FEW(small, model, intrafusion.inspect(model, X), X)


@pytest.mark.filterwarnings("ignore::intrafusion.IntrafusionWarning")
def test_one_batch_cannot_be_kept_apart_where_batches_are_needed_whole() -> None:
    """A batch norm without statistics gives an image something else in another batch."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(60, 6)
    small = intrafusion.compress(model, x[:2], 0.5, restore=None)
    with pytest.raises(ModelError, match="expected several batches, which this network needs whole, .* got 60"):
        FEW(small, model, intrafusion.inspect(model, x[:2]), x)


@pytest.mark.filterwarnings("ignore::intrafusion.IntrafusionWarning")
def test_of_few_inputs_some_are_kept_apart_too() -> None:
    small = distilled(wide(), replace(FEW, steps=5), IMAGES[:7])
    last = small.restored[-1]
    assert (last.measured_on, last.unseen) == ("1 images", True)


# ---- budget ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_more_than_there_are_is_a_batch_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = watch_plans(monkeypatch)
    few = replace(FEW, steps=4, batch=48)  # one in five of 60 is kept apart
    small = distilled(wide(), replace(few, batch=50_000))
    assert {how.accumulate for how in plans} == {1}
    assert is_same(small.model, distilled(wide(), few).model)


@pytest.mark.parametrize("batch", [3, 8])
def test_all_inputs_are_drawn_from(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where those are more than the updates from one look at the error to the next take."""
    seen, original = set[int](), Imitation.__call__

    def look(self: Imitation, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        seen.update(images.tolist())
        return original(self, model, images, labels)

    monkeypatch.setattr(Imitation, "__call__", look)
    distilled(wide(), Distill(steps=120, lr=1e-4, views=False, batch=batch))
    assert seen == set(range(48))  # one in five of 60 is kept apart


def test_it_ends_when_the_time_is_over() -> None:
    note = distilled(wide(), Distill(steps=100_000, seconds=2.0, lr=1e-3, views=False, batch=4)).restored[-1].note
    steps = int(note.split()[0])
    assert 0 < steps < 100_000


@pytest.mark.parametrize("seconds", [0, 0.0, -1.0, float("nan")])
def test_a_budget_of_nothing_is_refused(seconds: float) -> None:
    with pytest.raises(RecipeError, match="restorer 'distill': seconds: expected a finite number above 0 or None, got"):
        Recipe.of(restore={"name": "distill", "seconds": seconds})


# ---- interrupted ----------------------------------------------------------------------------------------------------


def test_one_that_was_interrupted_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = wide(), Distill(steps=120, batch=8, folder=str(tmp_path / "kept"))
    whole = distilled(model, replace(how, folder=None))
    calls, original = [0], Imitation.__call__

    def count(self: Imitation, *args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Imitation, "__call__", count)
    rates = 2 if "rate of 0.003" in whole.restored[-1].note else 3
    stop = 1 + rates * 6 + 70  # behind the trials and the first look
    with pytest.raises(KeyboardInterrupt):
        distilled(model, how)
    (place,) = (tmp_path / "kept").iterdir()
    assert {path.name for path in place.iterdir()} == {"checkpoint.pt", "choice.json"}
    calls[0], stop = 0, -1
    again = distilled(model, how)
    assert calls[0] == 1 + 120 - 60
    assert is_same(again.model, whole.model)
    assert not list((tmp_path / "kept").iterdir())


def test_another_network_does_not_go_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = replace(FEW, folder=str(tmp_path), steps=10)
    first = distilled(wide(), how)
    monkeypatch.setattr(distill_module.shutil, "rmtree", lambda *args, **kwargs: None)
    distilled(wide(), how)
    distilled(wide(), how, IMAGES.flip(0))
    assert len(list(tmp_path.iterdir())) == 2
    assert is_same(distilled(wide(), how).model, first.model)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(intrafusion.FolderError, match="cannot be made for checkpoints"):
        distilled(wide(), replace(FEW, folder=str(tmp_path / "file")))
