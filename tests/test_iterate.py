"""Several steps: the sizes of one, one plan for the original network, saved and loaded like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import IntraFusion, ModelError
from intrafusion.errors import BudgetError
from intrafusion.iterate import compose_maps, compress_in_steps, width_at
from intrafusion.reduce import ReductionMap
from intrafusion.restore import Calibration
from intrafusion.restore.synthesize import Synthesis


class Net(nn.Module):
    """A residual stream, a flattened head, and an inner layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.up, self.norm2 = nn.Conv2d(20, 31, 3, padding=1, bias=False), nn.BatchNorm2d(31)
        self.down = nn.Conv2d(31, 20, 1)
        self.hidden, self.head = nn.Linear(20 * 4, 17), nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(F.relu(self.norm2(self.up(x))))
        return self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))


def made() -> Net:
    return randomise_(Net()).eval()  # type: ignore[return-value]


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BARE = {"reducer": IntraFusion("function"), "restore": None}


@pytest.mark.parametrize("keep", [0.37, {"up": 0.25, "hidden": 0.5}])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_sizes_are_those_of_one_step(keep: object, steps: int) -> None:
    model = made()
    at_once = intrafusion.compress(model, EXAMPLE, keep, **BARE)  # type: ignore[arg-type]
    small = compress_in_steps(model, EXAMPLE, keep, steps, **BARE)  # type: ignore[arg-type]
    shapes = lambda network: {n: tuple(t.shape) for n, t in network.state_dict().items()}  # noqa: E731
    assert shapes(small.model) == shapes(at_once.model)
    assert small.plan.sizes == at_once.plan.sizes
    assert (small.before, small.after) == (at_once.before, at_once.after)
    assert [(d.group, d.n, d.m, d.members, d.reason) for d in small.plan.decisions] == [
        (d.group, d.n, d.m, d.members, d.reason) for d in at_once.plan.decisions
    ]


def test_one_step_is_compress() -> None:
    model = made()
    at_once, small = (
        intrafusion.compress(model, EXAMPLE, 0.5, **BARE),
        compress_in_steps(model, EXAMPLE, 0.5, 1, **BARE),
    )  # type: ignore[arg-type]
    assert small.plan == at_once.plan
    assert all(torch.equal(t, at_once.model.state_dict()[n]) for n, t in small.model.state_dict().items())


@pytest.mark.parametrize("normalization", ["source", "function"])
def test_the_plan_of_all_steps_makes_the_same_network_from_the_original(normalization: str) -> None:
    """Channels are merged linearly, so two maps in turn are their product."""
    model = made()
    small = compress_in_steps(model, EXAMPLE, 0.3, 3, reducer=IntraFusion(normalization), restore=None)
    assert all(len(m.merge) == small.plan.sizes[name] for name, m in small.plan.maps.items())
    again = intrafusion.apply(model, small.plan, EXAMPLE)
    torch.testing.assert_close(again.model(EXAMPLE), small.model(EXAMPLE), rtol=1e-4, atol=1e-4)
    assert (small.model(EXAMPLE) - model(EXAMPLE)).norm().item() > 0.1  # and it is not the original


def test_selected_channels_are_selected_in_all() -> None:
    small = compress_in_steps(made(), EXAMPLE, 0.3, 4, reducer="select", restore=None)
    for reduction in small.plan.maps.values():
        assert torch.equal(reduction.merge @ reduction.merge.T, torch.eye(len(reduction.merge)).double())
        assert reduction.merge.unique().tolist() == [0, 1]
        assert torch.equal(reduction.unmerge, reduction.merge.T)


def test_each_step_sees_what_training_left() -> None:
    """Training raises one channel that pruning at once would drop; it is kept from then on."""
    model, seen = made(), []
    with torch.no_grad():
        model.hidden.weight[3] *= 0.5

    def train(network: nn.Module) -> None:
        width = network.hidden.out_features  # type: ignore[union-attr]
        seen.append((width, network.training))
        network.train()
        network(EXAMPLE).sum().backward()
        with torch.no_grad():
            network.hidden.weight[0] *= 0.0  # type: ignore[index, operator]

    small = compress_in_steps(model, EXAMPLE, {"hidden": 0.4}, 3, train, reducer="select", restore=None)
    assert seen == [(width_at(17, 6, 1 / 3), False), (width_at(17, 6, 2 / 3), False)]
    assert not small.model.training
    assert all(p.grad is None for p in small.model.parameters())
    once = compress_in_steps(model, EXAMPLE, {"hidden": 0.4}, 3, reducer="select", restore=None)
    first = int(once.plan.maps["hidden"].merge[0].argmax())
    assert first not in small.plan.maps["hidden"].merge.argmax(1).tolist()


def test_saved_and_loaded_in_one_line(tmp_path: Path) -> None:
    model = made()

    def train(network: nn.Module) -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)

    small = compress_in_steps(model, EXAMPLE, 0.5, 3, train, **BARE)  # type: ignore[arg-type]
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", Net).eval()
    assert torch.equal(loaded(EXAMPLE), small.model(EXAMPLE))
    assert (loaded.hidden.in_features, loaded.hidden.out_features) == (40, 8)
    assert (loaded.up.in_channels, loaded.up.out_channels, loaded.norm2.num_features) == (10, 15, 15)
    assert str(small).count("hidden")


def test_the_original_is_not_touched() -> None:
    model = made().train()
    before = copy.deepcopy(model.state_dict())
    small = compress_in_steps(model, EXAMPLE, 0.5, 2, lambda network: network.zero_grad(), **BARE)  # type: ignore[arg-type]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert small.model.training


def test_restorers_run_in_every_step() -> None:
    images = torch.randn(32, 3, 8, 8)
    small = compress_in_steps(
        made(), EXAMPLE, 0.5, 3, images=iter(images.split(8)), reducer="fold", restore=("closed_form", "least_squares")
    )
    assert [r.step for r in small.restored] == ["ClosedForm", "LeastSquares"] * 3
    assert bool(torch.isfinite(small.model(EXAMPLE)).all())


def test_widths_fall_by_equal_factors() -> None:
    assert [width_at(1000, 125, k / 3) for k in range(4)] == [1000, 500, 250, 125]
    assert [width_at(3, 2, k / 4) for k in range(5)] == [3, 3, 2, 2, 2]
    assert [width_at(9, 9, k / 2) for k in range(3)] == [9, 9, 9]


def test_two_maps_in_turn() -> None:
    d = torch.float64
    first = ReductionMap(torch.randn(4, 6, dtype=d), torch.randn(6, 4, dtype=d), torch.randn(6, dtype=d))
    second = ReductionMap(torch.randn(2, 4, dtype=d), torch.randn(4, 2, dtype=d), torch.randn(4, dtype=d))
    both, x = compose_maps(first, second), torch.randn(6, dtype=d)
    inner = second.merge @ (first.merge @ x)
    torch.testing.assert_close(both.merge @ x, inner)
    assert both.shift is not None
    expected = first.unmerge @ (second.unmerge @ inner + second.shift) + first.shift  # type: ignore[operator]
    torch.testing.assert_close(both.unmerge @ inner + both.shift, expected)
    none = ReductionMap(second.merge, second.unmerge)
    assert compose_maps(first, none).shift is first.shift
    assert compose_maps(ReductionMap(first.merge, first.unmerge), none).shift is None


def test_errors() -> None:
    for steps in (0, 1.5, True):
        with pytest.raises(BudgetError, match="steps: expected a whole number from 1 to 10000"):
            compress_in_steps(made(), EXAMPLE, 0.5, steps)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="target: steps are planned from the sizes in `keep`"):
        compress_in_steps(made(), EXAMPLE, target={"params": 0.5})
    with pytest.raises(BudgetError, match="keep: expected a fraction"):
        compress_in_steps(made(), EXAMPLE, 1.5)
    with pytest.raises(ModelError, match="include and exclude leave no channel group to reduce"):
        compress_in_steps(made(), EXAMPLE, 0.5, exclude=["stem", "up", "hidden", "head", "down"])


def test_images_are_made_once_from_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is solved on the same ones, for the network that it starts from."""
    made_of, seen = [], []
    make, restore = Synthesis.__call__, Calibration.restore

    def note_making(self: Synthesis, network: nn.Module, *args: Any, **options: Any) -> Any:
        made_of.append(network)
        return make(self, network, *args, **options)

    def note_solving(self: Calibration, *args: Any) -> Any:
        seen.append((self.images, self.original))
        return restore(self, *args)

    monkeypatch.setattr(Synthesis, "__call__", note_making)
    monkeypatch.setattr(Calibration, "restore", note_solving)
    model = made()
    small = compress_in_steps(model, EXAMPLE, 0.5, 3, restore="synthetic")
    assert [network.up.weight.data_ptr() for network in made_of] == [model.up.weight.data_ptr()]
    assert [step.on for step in small.restored] == [small.restored[0].on] * 3
    assert len({id(images) for images, _ in seen}) == 1
    widths = [network.up.out_channels for _, network in seen]
    assert widths == [31, *(width_at(31, small.plan.sizes["up"], k / 3) for k in (1, 2))]
