"""Groups whose matrices do not fit are told before the work starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ModelError
from intrafusion.network.room import check_room, find_too_wide
from intrafusion.observe.moments import count_matrices, measure_moments

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


@pytest.mark.parametrize(("held", "needed"), [({}, 8 * 200), ({"a": 2, "b": 3}, 8 * (2 * 25 + 3 * 100 + 200))])
def test_choosing_takes_the_matrices_of_all_groups_and_work(
    held: dict[str, int], needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, needed)
    check_room({"a": 5, "b": 10}, held, CPU)
    check_room({}, held, CPU)
    give(monkeypatch, needed - 1)
    with pytest.raises(ModelError, match=r"group 'b': choosing among 10 channels takes at least .* that are free: "):
        check_room({"a": 5, "b": 10}, held, CPU)


class Read(nn.Module):
    """20 channels with a reader of 12 rows, 40 with two of three each, 12 with one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 20), nn.Linear(20, 12), nn.Linear(12, 2)
        self.wide, self.left, self.right = nn.Linear(4, 40), nn.Linear(40, 3), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x).tanh()
        narrow = self.last(self.second(self.first(x).tanh()).tanh())
        return torch.cat([narrow, self.left(wide), self.right(wide)], -1)


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


def test_the_moments_of_a_group_are_as_many_as_what_reads_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One covariance for each reader; the squares only where the rows that read are many."""
    monkeypatch.setattr("intrafusion.observe.moments.WIDE", 16)
    x = torch.randn(64, 4)
    model = Read().eval()
    graph = intrafusion.inspect(model, x[:2])
    held = count_matrices(model, graph, graph.reducible)
    assert {graph[name].size: count for name, count in held.items()} == {20: 1 + 1, 40: 2, 12: 1 + 1}
    for name, moments in measure_moments(model, graph, x).items():
        assert len(moments.covariances) + (moments.squares is not None) == held[name]
