"""What is printed of a smaller network: first what was gained, in words, then the table."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bare import compress as compress_bare
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed
from intrafusion.measure import comparison as comparison_module
from intrafusion.measure.comparison import Comparison
from intrafusion.network.held_out import held_out_places

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))

ALL = sorted(IMAGES.flatten(1).tolist())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 6, 3), nn.Flatten(), nn.Linear(96, 3)).eval()


@pytest.fixture(scope="module")
def small() -> Compressed:
    return intrafusion.compress(network(), X, 0.7, images=IMAGES)


def timed(small: Compressed, milliseconds: float) -> Compressed:
    """As if the original took 3 ms and the smaller one so many."""
    found = small.comparison
    assert found is not None
    before, after = replace(found.before, latency_ms=3.0), replace(found.after, latency_ms=milliseconds)
    return replace(small, comparison=replace(found, before=before, after=after, runs=30))


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).double()


def test_figures_are_of_images_that_the_solver_did_not_see(small: Compressed) -> None:
    places = held_out_places(300)
    held = IMAGES[places]
    assert small.images is not None
    assert set(map(tuple, small.images.join().tensors()[0].flatten(1).tolist())).isdisjoint(
        map(tuple, held.flatten(1).tolist())
    )
    found, expected = outputs(small.model, held), outputs(network(), held)
    error = float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())
    assert small.comparison is not None
    figure = small.comparison.held_out
    assert figure is not None
    assert (figure.on, figure.unseen) == ("60 images", True)
    assert figure.after.error == pytest.approx(error, rel=1e-4)
    assert figure.after.agreement == float((found.argmax(1) == expected.argmax(1)).double().mean())
    assert figure.before is not None
    assert figure.before.error > error
    assert small.restored[0].on == "240 images"


def test_the_summary_comes_first_and_fits(small: Compressed) -> None:
    lines = str(small).splitlines()
    assert lines[0] == "Sequential: 2 of 3 channel groups are smaller"
    assert [line.split()[0] for line in lines[1:5]] == ["parameters", "MACs", "file", "latency"]
    table = lines.index("") + 1
    assert lines[table].split()[:2] == ["group", "channels"]
    summary = " ".join(" ".join(lines[:table]).split())
    assert "outputs on 60 unseen images differ by" in summary
    assert re.search(
        r"restored: LeastSquares on 240 images, \S+ s, output error \S+ -> \S+ on 60 unseen images", summary
    )
    assert f"file {4 * small.before.params:,} bytes" in summary or " kB -> " in summary
    assert max(map(len, lines)) <= 100


def test_a_smaller_network_that_is_not_faster_is_said_to_be_so(small: Compressed) -> None:
    assert "not noticeably faster" not in str(timed(small, 2.0))
    said = " ".join(str(timed(small, 3.0)).split())
    assert "warning: the smaller network is not noticeably faster here. 1 of 1 sizes are no multiples of 8" in said
    assert "round_to=8 may help" in said


def test_rounding_is_not_advised_where_sizes_are_round() -> None:
    small = intrafusion.compress(network(), X, 0.7, images=IMAGES, round_to=8)
    said = " ".join(str(timed(small, 3.0)).split())
    assert "may help" not in said
    assert "target={'latency_ms': ...}" in said


def test_without_images_and_norms_it_says_that_noise_was_measured_on() -> None:
    said = " ".join(str(intrafusion.compress(network(), X, 0.7)).split())
    assert "outputs on 64 noise images, not used by the solver, differ by" in said


def test_a_step_that_was_measured_where_it_was_solved_says_so() -> None:
    said = " ".join(str(intrafusion.compress(network(), X, 0.7, images=IMAGES[:40])).split())
    assert re.search(r"restored: LeastSquares on 40 images, .* on the 40 images that it was solved on", said)


def test_images_are_measured_on_where_nothing_was_solved_on_them() -> None:
    small = compress_bare(network(), X, 0.7, images=IMAGES)
    assert small.comparison is not None
    figure = small.comparison.held_out
    assert figure is not None
    assert (figure.on, figure.unseen, figure.before) == ("64 images", True, None)
    found, expected = outputs(small.model, IMAGES[:64]), outputs(network(), IMAGES[:64])
    error = float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())
    assert figure.after.error == pytest.approx(error, rel=1e-4)
    streamed = compress_bare(network(), X, 0.7, images=IMAGES, restore="reestimate").comparison
    assert streamed is not None
    assert streamed.held_out is not None
    assert not streamed.held_out.unseen


def test_several_steps_keep_the_same_images_apart_and_are_compared_with_the_first_network() -> None:
    small = intrafusion.compress_in_steps(network(), X, 0.5, 2, images=IMAGES)
    assert [step.on for step in small.restored] == ["240 images"] * 2
    assert small.comparison is not None
    figure = small.comparison.held_out
    assert figure is not None
    held = IMAGES[held_out_places(300)]
    found, expected = outputs(small.model, held), outputs(network(), held)
    error = float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())
    assert figure.after.error == pytest.approx(error, rel=1e-4)
    assert small.comparison.before.params == sum(p.numel() for p in network().parameters())


def test_nothing_that_is_measured_fails_a_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(comparison_module, "time_turns", refuse)
    small = intrafusion.compress(network(), X, 0.7, images=IMAGES)
    assert "warning: latency could not be measured: RuntimeError: no clock" in str(small)


def test_a_plan_alone_is_printed_with_its_sizes(small: Compressed) -> None:
    applied = intrafusion.apply(network(), small.plan, X)
    assert applied.comparison is None
    assert f"parameters  {applied.before.params:,} -> {applied.after.params:,} (" in str(applied)
    assert "latency" not in str(applied)


def test_the_comparison_is_saved(small: Compressed, tmp_path: Path) -> None:
    small.save(tmp_path / "small")
    data = json.loads((tmp_path / "small" / "plan.json").read_text())["comparison"]
    assert Comparison.from_data(data) == small.comparison


def test_what_only_the_network_has_is_told_where_it_is(small: Compressed) -> None:
    with pytest.raises(AttributeError, match="'state_dict'; the network has it: .model.state_dict"):
        getattr(small, "state_dict")  # noqa: B009
    with pytest.raises(AttributeError, match=r"'Compressed' object has no attribute 'wings'$"):
        getattr(small, "wings")  # noqa: B009
    assert copy.copy(small).model is small.model
    assert copy.deepcopy(small).plan == small.plan
