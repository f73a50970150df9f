"""Groups whose matrices do not fit are told before the work starts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import ModelError
from intrafusion.network.room import check_room, find_too_wide

CPU = torch.device("cpu")


def give(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("intrafusion.network.room.find_free_memory", lambda _: free)


@pytest.mark.parametrize(
    ("free", "left"), [(8 * 125, []), (8 * 125 - 1, ["b"]), (8 * 25, ["b"]), (8 * 25 - 1, ["a", "b"])]
)
def test_the_widest_groups_go_until_the_others_fit(free: int, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, free)
    found = find_too_wide({"a": 5, "b": 10}, CPU)
    assert sorted(found) == left
    if left:
        assert found["b"].startswith("a matrix of its 10 x 10 channels takes 800 bytes, and ")


@pytest.mark.parametrize(("kept", "needed"), [(0, 8 * 200), (2, 8 * (2 * 125 + 200))])
def test_choosing_takes_the_matrices_of_all_groups_and_work(
    kept: int, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, needed)
    check_room({"a": 5, "b": 10}, kept, CPU)
    check_room({}, kept, CPU)
    give(monkeypatch, needed - 1)
    with pytest.raises(ModelError, match=r"group 'b': choosing among 10 channels takes at least .* that are free: "):
        check_room({"a": 5, "b": 10}, kept, CPU)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 20), nn.ReLU(), nn.Linear(20, 3)
    return nn.Sequential(*layers).eval()


def test_a_group_too_wide_to_be_proved_is_left_alone_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 100_000)
    graph = intrafusion.inspect(network(), torch.randn(2, 4))
    assert [g.size for g in graph.reducible] == [20]
    assert "a matrix of its 200 x 200 channels takes 320 kB, and 100 kB are free" in str(graph["0"].reason)


def test_compress_refuses_before_it_looks_at_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 1_000_000)  # 323 kB of permutations fit, 1.29 MB of moments and maps do not
    monkeypatch.setattr("intrafusion.restore.Calibration.moments_of", None)
    x = torch.randn(32, 4)
    with pytest.raises(
        ModelError, match=r"group '0': choosing among 200 channels .*1\.29 MB .*1 MB .*reducer='select'"
    ):
        intrafusion.compress(network(), x, 0.5, inputs=x)
    assert intrafusion.compress(network(), x, 0.5, reducer="select", restore=None).plan.sizes["0"] == 100
