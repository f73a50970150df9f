"""Tables are what the records give, and the judge of the compatibility table tells right from wrong."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intrafusion.reduce import Moments, ReductionProblem

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_tables_are_what_the_records_give() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_growth_is_the_exponent_of_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    assert tables.fit_growth({n: 0.3 * n**1.7 for n in (10, 25, 900)}) == "n^1.7"
    assert tables.fit_growth({10: 1.0}) == ""


def test_counts_of_random_tests_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import robustness

    printed = (
        "networks 0 of 4: {'right': 2}\n.\nnetworks 1 of 4: {'right': 1, 'refused': 3}\n\nsweeps: 3 kills\n2 passed"
    )
    assert robustness.read_counts(printed) == {"random networks": {"right": 3, "refused": 3}, "sweeps": {"kills": 3}}
    assert robustness.read_counts("networks: {'tried': 2}") == {"networks": {"tried": 2}}


def test_counts_beyond_a_thousand_are_a_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    from intrafusion.lab.bench import Record

    result = {"random networks": {"dead: right": 1500, "dead: refused": 20, "groups": 4000}, "plans": {"tried": 1600}}
    record = Record("robustness", {"times": 20}, result, {"time": "2026-01-01T00", "versions": {"torch": "2.13"}})
    *_, rows = tables.robustness([record]).partition("|---|---|---|\n")
    assert [row.split("|")[2:4] for row in rows.splitlines()] == [
        [" 1,520 ", " 1,500 right, 20 refused "],
        ["  ", " 4,000 groups "],
        [" 1,600 ", "  "],
    ]


def test_the_example_of_the_readme_is_shown_without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import example

    printed = "a net\nlatency 1 ms;\n  medians\nrestored: on 9 images, 1.7 s, error\nwarning: no\n  faster\n\ngroup"
    assert example.show_summary(printed) == ["a net", "restored: on 9 images, error"]


def test_what_is_lost_is_found_in_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival that is ahead, a network that is slower than its share, a family that is wrong: each has its line."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _losses
    from families import FAMILIES

    from intrafusion.lab.bench import Record

    def measured(network: str, method: str, accuracy: float) -> Record:
        setting = {"network": network, "test_images": 9, "keep": 0.9, "method": method}
        return Record("rivals", setting, {"accuracy": accuracy, "params": 1})

    family = next(iter(FAMILIES))
    told = {
        "rivals": [measured("net", "ours", 0.5), measured("net", "LBYL", 0.7), measured("net", "GRAIL", 0.9)],
        "export": [
            Record("export latency", {"network": "net", "mode": mode}, {"macs": 0.25, "1": [8.0, after]})
            for mode, after in (("eager", 6.0), ("onnxruntime", 2.0))
        ],
        "compatibility": [Record("c", {"family": family, "side": "ours"}, {"verdict": "wrong"})],
        "restoration": [
            Record("r", {**place, "reducer": reducer}, {"accuracy": accuracy})
            for place in ({"network": "net", "group": "all", "test_images": 9, "keep": 0.9, "restorer": "noise"},)
            for reducer, accuracy in (("pivot", 0.5), ("fold, folded", 0.6))
        ],
        "speed": [
            Record("speed", {"what": "inspect", "network": network}, {"ratio": ratio})
            for network, ratio in (("timm:net", 2.0), ("families, median", 3.0), ("zoo:net", 0.5))
        ],
    }
    monkeypatch.setattr(_losses, "read_latest", lambda name: told.get(name, []))
    lines = _losses.list_losses().splitlines()
    assert "ahead in 1 of 1 comparisons" in lines[0]
    assert "`net`, no data, keep 0.9: LBYL 70.0, ours 50.0 %" in lines[0]  # GRAIL sees images, ours here does not
    assert "in 1 of 1 comparisons, 1 of them at keep 0.8 and more; by 10.0 points" in lines[1]
    assert any("Ours over theirs: inspect on families, median 3.0; inspect on net 2.0." in line for line in lines)
    assert any("1 of 2 times are more than 15 points" in line and "eager, batch 1 (1)" in line for line in lines)
    assert f"*Families of networks*: 1 of 1 are not exact: {family} (wrong)." in lines[-1]


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import families.family
    import families.judge

    return families


class Normed(nn.Module):
    """A stream of 8 channels under a layer norm and a group norm, and an inner width of 6."""

    def __init__(self, stream: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.enter, self.norm, self.up = nn.Linear(3, stream), nn.LayerNorm(stream), nn.Linear(stream, inner)
        self.down, self.group, self.leave = nn.Linear(inner, stream), nn.GroupNorm(2, stream), nn.Linear(stream, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.leave(self.group(x))


def cut(net: Normed, stream: list[int], inner: list[int]) -> Normed:
    """Only these channels, cut by hand."""
    small = Normed(len(stream), len(inner)).double()
    sides = {"enter": (stream, None), "up": (inner, stream), "down": (stream, inner), "leave": (None, stream)}
    sides |= {"norm": (stream, None), "group": (stream, None)}
    with torch.no_grad():
        for name, along in sides.items():
            for part in ("weight", "bias"):
                tensor = net.get_parameter(f"{name}.{part}")
                for dim, kept in enumerate(along[: tensor.dim()]):
                    tensor = tensor if kept is None else tensor.index_select(dim, torch.tensor(kept))
                small.get_parameter(f"{name}.{part}").copy_(tensor)
    return small


KEPT = [0, 2, 5, 7], [1, 4, 5]  # two channels of each half of the stream, which are the groups of the norm


def test_the_judge_accepts_what_was_cut_right_and_nothing_else(families: Any) -> None:
    family = families.family.Family("", "", Normed, lambda: (torch.randn(5, 3),))
    net = families.family.randomise_(Normed().double())
    calls = [(torch.randn(5, 3, dtype=torch.float64),)]
    find_error = lambda small: families.judge.find_error(net, small, calls, family)  # noqa: E731
    small = cut(net, *KEPT)
    assert find_error(small) < 1e-14
    scaled = copy.deepcopy(small)
    scaled.down.weight.data *= 2.0  # linear between them
    scaled.up.weight.data /= 2.0
    scaled.up.bias.data /= 2.0
    assert find_error(scaled) < 1e-14
    mixed_up = copy.deepcopy(small)
    mixed_up.down.weight.data = mixed_up.down.weight[:, [1, 0, 2]].clone()
    assert find_error(mixed_up) > 1e-3
    unequal = cut(net, [0, 1, 2, 7], KEPT[1])  # three of the first group, one of the second
    assert find_error(unequal) > 1e-3
    foreign = copy.deepcopy(small)
    foreign.up.bias.data += 0.1
    with pytest.raises(families.judge.Unjudged, match="is no part of"):
        find_error(foreign)


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("attention")


def problem_of(x: Tensor, readers: Tensor, size: int) -> tuple[ReductionProblem, Tensor]:
    """Reducing what these rows show, read by one layer."""
    moments = Moments(x.mean(0)[None], torch.cov(x.T, correction=0)[None], readers.T @ readers)
    return ReductionProblem(readers.T, torch.ones(x.shape[1]).double(), size, moments=moments), readers


def make_rows() -> Tensor:
    x = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0]).double()) + torch.tensor([0, 9, 0, 1, 2]).double()


READERS = torch.tensor([[1.0, 1, 1, 1, 0.1], [1, 1, -1, 9, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(("rival", "kept"), [("MeanShift", [2, 4]), ("FLAP", [2, 3]), ("Wanda", [1, 3])])
def test_rivals_keep_what_their_scores_say(rivals: Any, rival: str, kept: list[int]) -> None:
    reducer = {"MeanShift": rivals.MeanShift(), "FLAP": rivals.MeanShift(weighs=True), "Wanda": rivals.Wanda()}[rival]
    problem, _ = problem_of(make_rows(), READERS, 2)
    assert reducer(problem).merge.argmax(1).tolist() == kept


def test_a_mean_shift_leaves_the_mean_of_what_is_read(rivals: Any) -> None:
    x, (problem, readers) = make_rows(), problem_of(make_rows(), READERS, 2)
    found = rivals.MeanShift()(problem)
    given = (x @ found.merge.T) @ (readers @ found.unmerge).T + readers @ found.shift
    torch.testing.assert_close(given.mean(0), (x @ readers.T).mean(0))


def test_gram_compensation_is_least_squares_through_the_origin(rivals: Any) -> None:
    x, (problem, readers) = make_rows(), problem_of(make_rows(), READERS, 2)
    found = rivals.Grail(strength=0.0)(problem)
    best = torch.linalg.lstsq(x @ found.merge.T, x @ readers.T).solution.T
    torch.testing.assert_close(readers @ found.unmerge, best)


def test_ranks_are_those_that_leave_the_least_error_on_the_rows(rivals: Any) -> None:
    x, layer = make_rows(), nn.Linear(5, 4).double()
    with torch.no_grad():
        small = rivals.split_layer(layer, x.T @ x / len(x), 0.9)
        wanted, given = x @ layer.weight.T, small(x) - layer.bias
    values = torch.linalg.svdvals(wanted)  # no other matrix of this rank comes closer
    torch.testing.assert_close((wanted - given).norm(), values[small[0].out_features :].norm(), rtol=1e-3, atol=1e-6)
