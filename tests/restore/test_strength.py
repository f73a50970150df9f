"""The choice of a strength, against an explicit loop that refits without the rows left out, and measures there."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.compressed import Compressed
from intrafusion.network.layers import Layer, Norm
from intrafusion.network.row_weights import weigh_evenly
from intrafusion.restore import LeastSquares
from intrafusion.restore.activation import Activation
from intrafusion.restore.ridge import Change, Lacking, Ridge
from intrafusion.restore.row_ridge import set_up_ridge
from intrafusion.restore.strength import STRENGTHS, Task, choose_strength, leave_out

GROUPS = torch.arange(60).repeat_interleave(2)  # sixty images of two rows
APART = leave_out(60)[GROUPS]


def sample(signal: float, constant: float, d: int = 40) -> tuple[Tensor, Tensor]:
    """Inputs whose rows of one image are alike, and what is lacking: a linear part, a constant, and noise."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = 2 * draw(60, d)[GROUPS] + 0.3 * draw(120, d) + 1
    return x, signal * x @ draw(d, 3) + constant + draw(60, 3)[GROUPS]


def task_of(lacking: Tensor, x: Tensor, weights: Tensor | None = None, bias: bool = True) -> Task:
    layer = Layer("layer", nn.Linear(x.shape[1], lacking.shape[1], bias=bias))
    return Task(layer, torch.zeros_like(lacking), lacking, None, lacking, weights)


def choose(task: Task, x: Tensor, apart: Tensor = APART, images: Tensor = GROUPS) -> float | None:
    found = choose_strength(task, task.ridge(x, STRENGTHS[0], 0.2), apart, images, 3)
    return None if found is None else found[0]


def augmented(x: np.ndarray, r: np.ndarray, lam: float) -> np.ndarray:
    """min |R - X D^T|^2 / k + lam |D|^2 as one plain least-squares problem."""
    if math.isinf(lam):
        return np.zeros((r.shape[1], x.shape[1]))
    system = np.concatenate([x / np.sqrt(len(x)), np.sqrt(lam) * np.eye(x.shape[1])])
    right = np.concatenate([r / np.sqrt(len(x)), np.zeros((x.shape[1], r.shape[1]))])
    return np.linalg.lstsq(system, right, rcond=None)[0].T


def by_image(rows: np.ndarray) -> np.ndarray:
    """What is left on the rows left out (k, c) for each image: squared, and squared in its mean, as often as it is."""
    own = GROUPS[APART].numpy()
    parts = [rows[own == image] for image in np.unique(own)]
    return np.array([[(part**2).sum(), len(part) * (part.mean(0) ** 2).sum()] for part in parts])


def refit(x: Tensor, lacking: Tensor, scarcity: float) -> dict[float | None, np.ndarray]:
    """What is left of each image left out, by strength; numpy, one plain least-squares problem for each."""
    kept = ~APART
    (a, b), (u, v) = ((t[kept].numpy(), t[APART].numpy()) for t in (x, lacking))
    found = dict[float | None, np.ndarray]()
    for strength in STRENGTHS:
        lam = (strength + scarcity * a.shape[1] / len(a)) * a.var(0).mean()
        change = augmented(a - a.mean(0), u - u.mean(0), lam)
        found[strength] = by_image(v - u.mean(0) - (b - a.mean(0)) @ change.T)
    return {**found, None: by_image(v)}


def pick(errors: dict[float | None, np.ndarray]) -> float | None:
    """The least, but for what is better by two standard errors over images, in rows and in means."""
    order = list(errors)
    best = order[0]
    for other in order[1:]:
        gains = errors[best] - errors[other]
        if all(column.sum() / np.sqrt((column**2).sum()) > 2 for column in gains.T):
            best = other
    return best


@pytest.mark.parametrize("d", [6, 40, 97, 150])  # more and fewer rows than unknowns
@pytest.mark.parametrize(("signal", "constant"), [(3.0, 0.0), (0.3, 0.0), (0.02, 0.3), (0.0, 5.0), (0.0, 0.0)])
def test_it_is_the_choice_of_an_explicit_loop(d: int, signal: float, constant: float) -> None:
    x, lacking = sample(signal, constant, d)
    assert choose(task_of(lacking, x), x) == pick(refit(x, lacking, 0.2))


def test_signal_constant_and_harm() -> None:
    """Solved for is what images left out share: a linear part, only a constant, or nothing."""
    x, lacking = sample(3, 0, 20)
    against = torch.where(APART[:, None], -1, 1) * (lacking - lacking.mean(0))
    opposite = torch.where(APART[:, None], -50, 50) + against
    found = [choose(task_of(lacking, x), x) for lacking in (lacking, against + 50, opposite)]
    assert found == [STRENGTHS[0], math.inf, None]


def test_what_is_flattered_is_not_taken_for_a_little() -> None:
    """Nothing is better on the images left out, by less than two of its standard errors."""
    x, lacking = sample(0.05, 0, 6)
    errors = refit(x, lacking, 0.2)
    assert errors[None][:, 0].sum() < errors[STRENGTHS[0]][:, 0].sum()
    assert choose(task_of(lacking, x), x) is not None


def test_what_is_better_at_places_and_not_in_means_is_not_taken() -> None:
    """Eight places in an image: a stronger ridge takes up less noise, and leaves more undone that is alike there."""
    generator, images = torch.Generator().manual_seed(2), torch.arange(60).repeat_interleave(8)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, apart = draw(480, 60), leave_out(60)[images]
    lacking = 0.3 * x @ draw(60, 3) + 10 * draw(480, 3)
    task = task_of(lacking, x)
    weak, strong = (task.ridge(x, s, 0.2).without(apart).solve(task.lacking) for s in (STRENGTHS[0], 1.0))
    unseen = task.take(apart)
    weakly, strongly = (unseen.measure(images[apart], x[apart] @ m.T + c) for m, c in (weak, strong))
    gain = weakly - strongly
    assert gain[:, 0].sum() > 2 * gain[:, 0].norm()
    assert gain[:, 1].sum() < 2 * gain[:, 1].norm()
    assert choose(task, x, apart, images) == STRENGTHS[0]


def test_four_images_tell_nothing() -> None:
    x, lacking = sample(0, 0)
    fewer = GROUPS.clone()
    fewer[APART] = GROUPS[APART].unique()[:4].repeat(6)
    assert choose(task_of(lacking, x), x) != STRENGTHS[0]
    assert choose(task_of(lacking, x), x, images=fewer) == STRENGTHS[0]


def test_a_layer_without_constant_is_not_given_one() -> None:
    x, lacking = sample(0, 50)
    x = x - x.mean(0)
    assert choose(task_of(lacking, x, bias=False), x) != math.inf


def test_rows_without_weight_tell_nothing() -> None:
    """Weights of 0 and 1 are rows that are there and rows that are not."""
    x, lacking = sample(0.3, 0)
    counted = torch.rand(120, generator=torch.Generator().manual_seed(3)) < 0.5
    spoilt = torch.where(counted[:, None], lacking, 1e3 * torch.randn(120, 3, dtype=torch.float64))
    weights = weigh_evenly(counted.double())
    expected = choose(task_of(lacking[counted], x[counted]), x[counted], APART[counted], GROUPS[counted])
    assert choose(task_of(spoilt, x, weights), x) == expected


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("d", [6, 97, 150])
def test_a_ridge_without_some_rows_is_that_of_the_others(d: int, weighted: bool, intercept: bool) -> None:
    x, lacking = sample(0.3, 2.0, d)
    weights = weigh_evenly(torch.rand(120, generator=torch.Generator().manual_seed(2)).double()) if weighted else None
    rest = None if weights is None else weigh_evenly(weights[~APART][:, 0])
    for strength in (0.01, math.inf):
        whole = set_up_ridge(x, strength, scarcity=0.2, intercept=intercept, weights=weights)
        found = whole.without(APART).solve(lambda _, own: lacking[own])
        alone = set_up_ridge(x[~APART], strength, scarcity=0.2, intercept=intercept, weights=rest)
        for one, other in zip(found, alone.solve(lambda _, own: lacking[~APART][own]), strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_another_strength_is_a_ridge_of_that_strength() -> None:
    x, lacking = sample(0.3, 2.0)
    found = set_up_ridge(x, 1e-3, scarcity=0.2).with_strength(0.7).solve(lambda _, own: lacking[own])
    torch.testing.assert_close(found, set_up_ridge(x, 0.7, scarcity=0.2).solve(lambda _, own: lacking[own]))


def test_an_infinite_strength_leaves_the_constant() -> None:
    x, lacking = sample(0.3, 2.0)
    change, shift = set_up_ridge(x, math.inf).solve(lambda _, own: lacking[own])
    assert not change.any()
    torch.testing.assert_close(shift, lacking.mean(0))


def test_what_comes_out_of_the_activation_function_counts() -> None:
    """Lacking where the function gives zero whatever is added: before it a constant helps, behind it nothing does."""
    x, _ = sample(0, 0)
    relu, norm = Activation(torch.relu), Norm(None, None, torch.zeros(3), torch.ones(3), 0.0)
    given, target = torch.full((120, 3), -9.0).double(), torch.full((120, 3), -5.0).double()
    layer = Layer("layer", nn.Linear(40, 3), norm)
    assert choose(Task(layer, given, target, None, target, None), x) is not None
    assert choose(Task(layer, given, target, relu, relu(target), None), x) is None
    assert choose(Task(layer, given, target, relu, None, None), x) is None  # what it makes of the target


def test_without_more_said_what_the_function_makes_of_the_target_is_wanted() -> None:
    x, lacking = sample(0.3, -0.2)
    relu = Activation(torch.relu)
    said = replace(task_of(lacking, x), given=torch.ones_like(lacking), activation=relu, wanted=relu(lacking))
    some, rows = torch.tensor([1, 7, 20]), slice(3, 9)
    for one, other in ((said, replace(said, wanted=None)), (said.take(APART), replace(said, wanted=None).take(APART))):
        assert torch.equal(one.lacking(x[some, :3], some), other.lacking(x[some, :3], some))
        assert torch.equal(one.find_error(rows, None), other.find_error(rows, None))
    plain = replace(task_of(lacking, x), wanted=None)
    assert torch.equal(plain.find_error(rows, None), lacking[rows])


def test_behind_a_function_rows_left_out_have_no_part_in_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise: what the others are like cannot be told from the rows that are solved on."""
    x, lacking = sample(0, 1, 60)
    relu, rows, respond = Activation(torch.relu), list[Tensor | None](), Ridge.respond
    task = replace(task_of(lacking, x), given=torch.ones_like(lacking), activation=relu, wanted=relu(lacking))
    alone = set_up_ridge(x[~APART], STRENGTHS[0], scarcity=0.2)
    told = alone.respond(task.take(~APART).lacking, 3)
    fits = [alone.with_strength(strength).fit(told) for strength in STRENGTHS]
    left = {
        strength: by_image((relu(lacking) - relu(1 + x @ matrix.T + constant))[APART].numpy())
        for strength, (matrix, constant) in zip(STRENGTHS, fits, strict=True)
    }
    left = {**left, None: by_image((relu(lacking) - 1)[APART].numpy())}
    monkeypatch.setattr(Ridge, "respond", lambda self, *how: rows.append(self.fitted) or respond(self, *how))
    assert choose(task, x) == pick(left) != STRENGTHS[0]
    assert [own.tolist() for own in rows if own is not None] == [(~APART).nonzero()[:, 0].tolist()]


def test_constant_inputs() -> None:
    _, lacking = sample(0, 5)
    assert choose(task_of(lacking, torch.ones(120, 4)), torch.ones(120, 4).double()) is not None


@pytest.mark.parametrize("count", [26, 44, 50, 121, 256])
def test_one_image_in_five_is_left_out(count: int) -> None:
    assert 0.15 * count < int(leave_out(count).sum()) <= 0.25 * count


def test_mirror_images_are_left_out_together() -> None:
    apart = leave_out(206)
    assert torch.equal(apart[:103], apart[103:])


@pytest.mark.parametrize("count", [0, 1, 9, 25])
def test_none_is_left_out_where_that_would_be_fewer_than_five(count: int) -> None:
    assert not leave_out(count).any()


# ---- in the solver --------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """More unknowns than images, and one row for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 160), nn.Linear(160, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def made(network: type[nn.Module]) -> nn.Module:
    return randomise_(network()).eval()


def halve(model: nn.Module, example: Tensor) -> tuple[Compressed, intrafusion.ChannelGraph]:
    graph = intrafusion.inspect(model, example)
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5, reducer="select"))
    return intrafusion.apply(model, plan, example, graph=graph), graph


def error(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


def test_a_strength_that_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intrafusion.restore.solver.choose_strength", None)  # called, it fails
    model = made(Wide)
    small, graph = halve(model, draw(1, 0))
    LeastSquares(strength=0.1)(small, model, graph, draw(40, 1))


@pytest.mark.parametrize("count", [1, 25])
def test_few_images_are_solved_with_the_strength_for_conditioning(count: int) -> None:
    model, found = made(Wide), []
    for strength in (None, STRENGTHS[0]):
        small, graph = halve(model, draw(1, 0))
        LeastSquares(strength=strength)(small, model, graph, draw(count, 1))
        found.append(small.model.state_dict()["second.weight"])
    assert torch.equal(*found)


def test_images_as_they_were_seen_already_tell_nothing_new() -> None:
    """Every image forty times: leaving some out leaves their copies in."""
    model = made(Wide)
    small, graph = halve(model, draw(1, 0))
    x = draw(1, 1).expand(40, -1).clone()
    LeastSquares()(small, model, graph, x)
    assert error(small.model, model, x) < 1e-3


def test_rows_that_are_images_and_rows_that_are_places() -> None:
    """What is chosen for convolutions is left out by image, not by row."""
    seen: list[Tensor] = []

    def look(task: Task, ridge: Ridge, apart: Tensor, images: Tensor, steps: int) -> tuple[float, Change | None]:
        assert torch.equal(apart, leave_out(40)[images])
        seen.append(apart)
        return STRENGTHS[0], None

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))

    model, x = made(Pooled), torch.randn(40, 3, 10, 10)
    small, graph = halve(model, x[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intrafusion.restore.solver.choose_strength", look)
        LeastSquares()(small, model, graph, x)
    by_row, by_image = seen
    assert torch.equal(by_row.reshape(40, -1).double().mean(1), leave_out(40).double())
    assert torch.equal(by_image, leave_out(40))


def test_of_the_steps_the_last_is_taken_on_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts from what the others led to on a part; without a function behind there are none."""
    seen, solve, found = list[tuple[int, bool]](), Ridge.solve, list[int]()

    def choose(task: Task, ridge: Ridge, apart: Tensor, images: Tensor, steps: int) -> tuple[float, Change | None]:
        found.append(steps)
        change = ridge.without(apart).solve(task.lacking, steps)
        return STRENGTHS[0], change

    def look(self: Ridge, lacking: Lacking, steps: int = 0, start: Change | None = None) -> Change:
        seen.append((steps, start is not None))
        return solve(self, lacking, steps, start)

    monkeypatch.setattr("intrafusion.restore.solver.choose_strength", choose)
    monkeypatch.setattr(Ridge, "solve", look)
    layers = (nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    model = randomise_(nn.Sequential(*layers)).eval()  # of these the first needs no change
    small, graph = halve(model, draw(1, 0))
    LeastSquares(steps=3)(small, model, graph, draw(40, 1))
    assert found == [2, 0]
    assert seen == [(2, False), (1, True), (0, False), (0, True)]
