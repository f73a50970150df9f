"""What two networks take, and the words in which it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intrafusion.measure import comparison as comparison_module
from intrafusion.measure.closeness import Closeness
from intrafusion.measure.comparison import Comparison, Footprint, HeldOut, compare_networks
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs

X = torch.zeros(4, 6)


def compare(model: nn.Module, small: nn.Module) -> Comparison:
    return compare_networks(model, small, Inputs((X,)), size_of(model, X), size_of(small, X))


def test_sizes_are_those_of_the_tensors() -> None:
    found = compare(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.Linear(6, 8).half().float())
    assert (found.before.params, found.before.macs) == (72, 192)
    assert found.before.bytes == 4 * (72 + 16) + 8
    assert found.after.bytes == 4 * 56
    assert (found.batch, found.threads, found.device) == (4, torch.get_num_threads(), "cpu")
    assert found.runs > 0
    assert found.failed is None


class Slow(nn.Linear):
    """Tells how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Slow.calls += 1
        return super().forward(x)


def test_huge_networks_are_timed_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_module, "_SECONDS", 0.0)
    size = size_of(nn.Linear(6, 2), X)
    Slow.calls = 0
    found = compare_networks(Slow(6, 2), Slow(6, 2), Inputs((X,)), size, size)
    assert found.runs == 1
    assert Slow.calls == 4  # of each: whether it runs, and one that is timed
    assert found.before.latency_ms is not None


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise MemoryError("no room")


def test_what_cannot_be_timed_is_told_and_not_raised() -> None:
    size = size_of(nn.Linear(6, 2), X)
    found = compare_networks(nn.Linear(6, 2), Broken(6, 2), Inputs((X,)), size, size)
    assert found.after.latency_ms is None
    assert found.speedup is None
    assert found.is_faster is None
    assert "no room" in str(found.failed)
    assert [name for name, _ in found.rows()] == ["parameters", "MACs", "file"]


MADE = Comparison(
    Footprint(1000, 2000, 4_100_000, 3.0),
    Footprint(500, 1500, 2_000, 2.0),
    batch=1,
    threads=2,
    device="cpu",
    runs=30,
    held_out=HeldOut("51 images", True, Closeness(0.0312, 0.974), Closeness(0.41, 0.5)),
)


def test_what_is_said() -> None:
    assert MADE.rows() == [
        ("parameters", "1,000 -> 500 (50.0%)"),
        ("MACs", "2,000 -> 1,500 (75.0%)"),
        ("file", "4.1 MB -> 2 kB (0.0%)"),
        (
            "latency",
            "3 ms -> 2 ms (1.50 times as fast; batch 1 on cpu, 2 threads, medians of 30 runs in turn)",
        ),
    ]
    assert "on cuda, medians" in replace(MADE, device="cuda").rows()[3][1]
    assert "1 thread, one run each" in replace(MADE, threads=1, runs=1).rows()[3][1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "outputs on 51 unseen images differ by 3.1 % of their variance (41 % before restoring); "
            "labels agree on 97 %",
        ),
        ({"before": None, "after": Closeness(2.0)}, "outputs on 51 unseen images differ by 200 % of their variance"),
        (
            {"on": "25 images made from the network", "before": None, "after": Closeness(1e-6, 1.0)},
            "outputs on 25 images made from the network, not used by the solver, differ by less than 0.01 % of their "
            "variance; labels agree on 100 %",
        ),
        (
            {"unseen": False, "on": "40 images", "before": None, "after": Closeness(0.0, 0.998)},
            "outputs on the 40 images that it was solved on differ by 0 % of their variance; labels agree on 99.8 %",
        ),
    ],
)
def test_the_outputs_in_words(changes: dict[str, Any], said: str) -> None:
    assert MADE.held_out is not None
    assert " ".join(replace(MADE.held_out, **changes).row()) == said


@pytest.mark.parametrize("milliseconds", [2.0, 2.99, 3.1])
def test_what_varies_is_not_faster(milliseconds: float) -> None:
    found = replace(MADE, after=replace(MADE.after, latency_ms=milliseconds))
    assert found.is_faster is (milliseconds < 2.9)
    assert replace(found, runs=2).is_faster is None


@pytest.mark.parametrize("made", [MADE, replace(MADE, held_out=None, failed="no room")])
def test_it_survives_json(made: Comparison) -> None:
    assert Comparison.from_data(json.loads(json.dumps(made.to_data()))) == made
