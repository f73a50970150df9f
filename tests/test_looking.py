"""What a prompt shows of every object of the library fits a screen."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import Alignment, ChannelGroup, Fused, Recipe, Select, restore
from intrafusion.brief import show_briefly
from intrafusion.factorize import factorize
from intrafusion.importance import CHIP, Observation, Random, Taylor
from intrafusion.lab import zoo
from intrafusion.network.inputs import Inputs
from intrafusion.reduce import Moments, ReductionMap
from intrafusion.restore import Calibration, LeastSquares, calibrate
from intrafusion.train import Training, train_

LINES, COLUMNS = 40, 100

# Made only by what this test does not run: the command line, experiments and reports, clusters, real data sets.
OUT_OF_REACH = ("intrafusion.cli", "intrafusion.lab")


def public_classes() -> Iterator[type]:
    """Every dataclass of the library that has a public name, where it is defined."""
    for module in pkgutil.walk_packages(intrafusion.__path__, "intrafusion."):
        if module.name != "intrafusion.__main__" and not module.name.startswith(OUT_OF_REACH):
            for name, kind in vars(importlib.import_module(module.name)).items():
                if inspect.isclass(kind) and is_dataclass(kind) and kind.__module__ == module.name and name[0] != "_":
                    yield kind


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.long_named_projection_of_the_pooled_features = nn.Linear(8, 40)
        self.head = nn.Linear(40, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.long_named_projection_of_the_pooled_features(x.mean((2, 3))).relu())


class Words(nn.Module):
    """Attention over tokens, each of which sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norms = nn.Embedding(20, 16), nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = self.qkv(self.norms[0](x)).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        if attention_mask is not None:
            hidden = hidden | (attention_mask[:, None, None] == 0)
        seen = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(hidden, -1e4).softmax(3) @ v
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.up(self.norms[1](x)).relu()))


@pytest.fixture(scope="module")
def seen() -> dict[type, list[Any]]:
    """A few objects of each class that ordinary use of the library makes."""
    found: dict[type, list[Any]] = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        for kind in set(public_classes()):
            watch(patch, kind, found)
        use_the_library()
    return found


def watch(patch: pytest.MonkeyPatch, kind: type, found: dict[type, list[Any]]) -> None:
    init = kind.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if len(found[type(self)]) < 5:
            found[type(self)].append(self)

    patch.setattr(kind, "__init__", noted)


def use_the_library() -> None:
    torch.manual_seed(0)
    model, x, images = Net().eval(), torch.randn(2, 3, 8, 8), torch.randn(64, 3, 8, 8)
    labels = torch.arange(64) % 4
    for options in (
        {"keep": {"blocks.*": 0.5, "stem*": 0.75, "long_named*": 0.25}, "images": images},
        {"reducer": "intrafusion", "importance": "taylor", "images": [(images, labels)], "restore": ["closed_form"]},
        {"reducer": "fold", "importance": "chip", "images": images, "restore": "noise", "exclude": nn.Linear},
    ):
        intrafusion.compress(model, x, **options)
    small = intrafusion.compress(model, x, target={"params": 0.6}, images=images)
    intrafusion.compress_in_steps(model, x, 0.5, 2, restore=None)
    tokens = torch.randint(20, (64, 7), generator=torch.Generator().manual_seed(0))
    texts = {"ids": tokens, "attention_mask": (torch.arange(7) < torch.arange(64)[:, None] % 7 + 1).long()}
    intrafusion.compress(Words().eval(), {name: t[:2] for name, t in texts.items()}, 0.5, inputs=texts)
    intrafusion.compress(Words().eval(), tokens[:2], 0.5)
    intrafusion.fuse([model, Net().eval()], x, using="activations", images=images)
    factorize(model, x)
    calibrate(model, Inputs.of(x), "synthetic", synthesis=restore.Synthesis(steps=2))
    train_(small.model, zoo.Images(images, labels), Training(epochs=1))


KINDS = sorted(set(public_classes()), key=lambda kind: (kind.__module__, kind.__qualname__))


def check_fits(text: str) -> None:
    lines = text.split("\n")
    assert len(lines) <= LINES, text
    assert max(map(len, lines)) <= COLUMNS, text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__qualname__)
def test_every_object_fits_a_screen(kind: type, seen: dict[type, list[Any]]) -> None:
    for data in seen[kind]:
        check_fits(repr(data))
        check_fits(str(data))


def test_the_objects_are_those_of_ordinary_use(seen: dict[type, list[Any]]) -> None:
    for kind in (intrafusion.ChannelGraph, intrafusion.Plan, Calibration, Observation, Moments, ReductionMap, Fused):
        assert seen[kind], kind
    assert len([kind for kind in KINDS if seen[kind]]) > 50


@pytest.mark.parametrize("kind", [CHIP, Taylor, Random, Select, Alignment, LeastSquares])
def test_methods_show_what_is_not_as_by_default(kind: type) -> None:
    check_fits(repr(kind()))


# ---- what it says ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    weight: torch.Tensor
    name: str = "conv"
    sizes: tuple[int, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None

    __repr__ = show_briefly


def test_shapes_stand_for_tensors_and_what_is_as_by_default_is_left_out() -> None:
    assert repr(Sample(torch.zeros(2, 3))) == "Sample(weight=float32[2, 3])"
    assert repr(Sample(torch.zeros(2), "fc", (1, 2), {"a": torch.ones(1, dtype=torch.int64)}, nn.Linear(2, 2))) == (
        "Sample(weight=float32[2], name='fc', sizes=(1, 2), more={'a': int64[1]}, module=Linear(...))"
    )


def test_what_is_wider_than_a_screen_has_a_line_for_each_field() -> None:
    shown = repr(Sample(torch.zeros(1), "x" * 60, tuple(range(1000)), {f"key {k}": "y" * 50 for k in range(100)}))
    check_fits(shown)
    assert shown.splitlines()[:2] == ["Sample(", "    weight=float32[1],"]
    assert "sizes=(0, 1, 2, ...)," in shown


def test_a_changed_zero_is_not_taken_for_a_changed_no() -> None:
    assert repr(Recipe.of(seed=1)).endswith("seed=1)")
    assert "keep=1.0" in repr(Recipe.of(keep=1.0))


def test_graphs_and_plans_are_one_line_at_a_prompt_and_a_table_when_printed() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    graph = intrafusion.inspect(model, x)
    assert repr(graph) == "ChannelGraph(3 groups, 2 can be reduced; print it to see them)"
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5, reducer="select"), x)
    assert repr(plan) == "Plan(2 of 3 groups are reduced; print it to see them)"
    assert "2 of 3 groups can be reduced" in str(graph).splitlines()
    assert str(plan).splitlines()[2].split()[:5] == ["stem.0", "8", "->", "4", "selected"]


def test_a_printed_group_shows_its_members() -> None:
    graph = intrafusion.inspect(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 3))
    assert str(graph["0"]).splitlines() == [
        "0: 5 channels, mixed",
        "  0.weight[0] produces",
        "  2.weight[1] consumes",
        "  0.bias[0] shifts",
    ]
    many = ChannelGroup("many", 5, graph["0"].members * 40, "a reason")
    assert str(many).splitlines()[:2] == ["many: 5 channels, kept", "  a reason"]
    assert str(many).splitlines()[-1] == "  and 95 more"


def test_notebooks_show_the_result_as_a_table() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    small = intrafusion.compress(model, x, keep=0.5, reducer="select", restore=None)
    page = small._repr_html_()
    figures, plan = re.findall(r"<table.*?</table>", page)
    assert (figures.count("<tr>"), plan.count("<tr>")) == (1 + 4, 1 + 3)
    (latency,) = re.findall(r">latency</td><td[^>]*>([^<]*medians of \d+ runs in turn\))", figures.replace("<wbr>", ""))
    assert "\n" not in latency, "the page breaks lines, where it is narrow"
    assert "8 -&gt; 4" in page
    assert f"{small.after.params:,}" in page
