"""Ranks and widths in one budget: what is chosen, proved, saved, loaded, shown and refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import intrafusion
from intrafusion import (
    BudgetError,
    Compressed,
    IntrafusionWarning,
    ModelError,
    PlanError,
    Recipe,
    RecipeError,
    ranks,
)
from intrafusion import plan as plans
from intrafusion.cli.main import app
from intrafusion.frontiers import frontier
from intrafusion.io.card import CARD
from intrafusion.lab import zoo
from intrafusion.network.sources import import_transformers
from intrafusion.plan import Plan, is_miss
from intrafusion.surgery.lowrank import LowRank, ranks_of

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions, of which the middle ones may have a low rank, on a residual stream."""

    def __init__(self, rank: int | None = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.first, self.second = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(64, 10)
        for layer in (self.first, self.second) if rank else ():
            u, s, vh = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
            layer.weight.data = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(layer.weight.shape)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.second(self.first(x).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def both() -> Compressed:
    return intrafusion.compress(Net(), X, target={"macs": 0.4}, ranks=True, inputs=IMAGES)


def test_layers_of_low_rank_become_two_and_the_target_is_met(both: Compressed) -> None:
    assert both.plan.ranks.keys() == ranks_of(both.model).keys()
    assert "first" in both.plan.ranks
    assert both.plan.ranks == ranks_of(both.model)
    assert both.after.macs / both.before.macs == pytest.approx(0.4, rel=0.02)
    assert both.before == intrafusion.measure.size.size_of(Net(), X)
    assert any("layers become two, as" in note for note in both.notes)
    alone = intrafusion.compress(Net(), X, target={"macs": 0.4}, inputs=IMAGES)
    errors = [small.comparison.held_out.after.error for small in (both, alone)]  # type: ignore[union-attr]
    assert errors[0] < 0.9 * errors[1]


def test_where_ranks_gain_too_little_widths_alone_are_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_WORTH", 0.0)
    model = Net(rank=None)
    found, alone = (intrafusion.compress(model, X, target={"macs": 0.6}, ranks=r, inputs=IMAGES) for r in (True, False))
    assert found.plan.split == {}
    assert found.plan.sizes == alone.plan.sizes
    assert any("ranks: no layer becomes two, as that gains too little" in note for note in found.notes)
    for a, b in zip(found.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_table_says_which_layer_has_which_rank(both: Compressed) -> None:
    shown, rank = str(both), both.plan.ranks["first"]
    assert f"24 -> rank {rank}" in shown
    assert "factorised: the layer becomes two thinner ones" in " ".join(shown.split())
    assert " of lower rank" in shown
    assert ".reduce" not in shown.split("\n\n")[1]


def test_a_full_rank_that_nothing_is_cut_of_is_the_network() -> None:
    """Carried out without restoring, ranks as high as the weights' give the outputs of the original."""
    small = intrafusion.compress(Net(), X, ranks=0.3, restore=None, inputs=IMAGES, exclude=["stem", "head"])
    assert small.plan.ranks == {"first": int(0.3 * 144 * 24 / 168), "second": int(0.3 * 16 * 216 / 232)}  # 6 and 4
    with torch.no_grad():
        assert oracle.relative_difference([small.model(IMAGES)], [Net()(IMAGES)]) < 1e-4


def test_a_plan_is_applied_saved_and_loaded(both: Compressed, tmp_path: Path) -> None:
    model = Net()
    again = intrafusion.apply(model, both.plan, X)
    assert again.plan.ranks == both.plan.ranks
    assert (again.before, again.after) == (both.before, both.after)
    assert type(model.first) is nn.Conv2d
    read = Plan.from_json(both.plan.to_json(), both.plan.maps)
    assert read == both.plan
    assert read != plans.replace(both.plan, split={"first": 23})
    both.save(tmp_path / "small", program=True)
    for given in (Net, Net(rank=None)):
        loaded = intrafusion.load(tmp_path / "small", given)
        assert torch.equal(loaded(IMAGES), both.model(IMAGES))
    exported = intrafusion.load(tmp_path / "small", trust_program=True)
    torch.testing.assert_close(exported(IMAGES), both.model(IMAGES))
    assert "rank" in (tmp_path / "small" / CARD).read_text()


def test_an_older_version_says_that_it_is_too_old(
    both: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both.save(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "plan.json").read_text())["format"] == 2
    assert json.loads(plans.replace(both.plan, split={}).to_json())["format"] == 1
    monkeypatch.setattr(plans, "_FORMAT", 1)
    with pytest.raises(PlanError, match="the plan has format 2, this version reads up to 1; upgrade intrafusion"):
        intrafusion.load(tmp_path / "small", Net)


@pytest.mark.parametrize("split", [{"first": "x"}, {"first": -1}, ["first"], {"nowhere": 3}])
def test_a_damaged_split_is_refused(both: Compressed, tmp_path: Path, split: Any) -> None:
    both.save(tmp_path / "small")
    path = tmp_path / "small" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split": split}))
    with pytest.raises(PlanError):
        intrafusion.load(tmp_path / "small", Net)


def test_a_network_of_the_zoo_is_loaded_without_its_class(tmp_path: Path) -> None:
    model, x = zoo.build("digits_resnet").eval(), zoo.example_input("digits_resnet")
    small = intrafusion.compress(model, x, ranks=0.5, keep=0.8, restore=None)
    assert small.plan.ranks == ranks_of(small.model)
    assert len(small.plan.ranks) > 5
    small.save(tmp_path / "small")
    torch.testing.assert_close(intrafusion.load(tmp_path / "small")(x), small.model(x))


# ---- ways ----------------------------------------------------------------------------------------------------------


def test_only_ranks_leave_the_widths_alone() -> None:
    small = intrafusion.compress(Net(), X, target={"params": 0.5}, ranks="only", inputs=IMAGES)
    assert small.after.params / small.before.params == pytest.approx(0.5, rel=0.03)
    for name, layer in Net().named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            there = small.model.get_submodule(name)
            last = there.expand if isinstance(there, LowRank) else there
            assert len(last.weight) == len(layer.weight)  # type: ignore[arg-type]


def test_a_target_that_ranks_alone_cannot_reach_is_said() -> None:
    with pytest.warns(IntrafusionWarning, match="target missed"):
        small = intrafusion.compress(Net(), X, target={"macs": 0.01}, ranks="only", inputs=IMAGES, restore=None)
    assert any(map(is_miss, small.plan.warnings))
    assert set(small.plan.ranks.values()) == {1}


def test_a_share_of_the_weights_goes_with_widths_by_name() -> None:
    small = intrafusion.compress(Net(), X, {"first": 0.5}, ranks=0.5, restore=None, inputs=IMAGES)
    first = small.model.get_submodule("first")
    assert isinstance(first, LowRank)
    assert len(first.expand.weight) == 12  # type: ignore[arg-type]
    assert first.rank == int(0.5 * 144 * 12 / 156)
    assert small.plan.recipe.keep == {"first": 0.5}


@pytest.mark.parametrize("reducer", ["select", "intrafusion", "fold", "eliminate"])
def test_ranks_are_lowered_along_the_best_directions_whatever_reduces_channels(reducer: str) -> None:
    small = intrafusion.compress(Net(), X, ranks=0.3, reducer=reducer, restore=None, include=["first"], inputs=IMAGES)
    assert small.plan.ranks.keys() == {"first"}
    with torch.no_grad():
        assert oracle.relative_difference([small.model(IMAGES)], [Net()(IMAGES)]) < 1e-4


def test_without_anything_seen_it_is_the_singular_values_of_the_weight() -> None:
    class Two(nn.Module):  # two images: none can be made
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(a).relu() * self.first(b).relu())

    model, call = Two().eval(), (torch.randn(1, 12), torch.randn(1, 12))
    small = intrafusion.compress(model, call, ranks=0.5, restore=None, include=["first"])
    pair = small.model.get_submodule("first")
    assert isinstance(pair, LowRank)
    product = pair.expand.weight @ pair.reduce.weight  # type: ignore[operator]
    u, s, vh = torch.linalg.svd(model.first.weight, full_matrices=False)
    wanted = (u[:, : pair.rank] * s[: pair.rank]) @ vh[: pair.rank]
    torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-5)


def test_a_frontier_of_ranks_and_widths() -> None:
    found = frontier(Net(), X, IMAGES, sizes=[0.6, 0.4], ranks=True)
    assert [len(point.compressed.plan.ranks) > 0 for point in found][1]
    assert found[1].cost.macs / found[1].compressed.before.macs == pytest.approx(0.4, rel=0.02)


def test_transformers_of_torch_and_tied_weights_keep_what_cannot_be_two() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model, x = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 4)).eval(), torch.randn(2, 5, 8)
    small = intrafusion.compress(model, x, ranks=0.5, restore=None)
    assert set(small.plan.ranks) == {"0", "2"}  # the module around the others reads their weights


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_a_network_of_transformers_is_loaded_by_us_and_not_by_from_pretrained(tmp_path: Path) -> None:
    transformers = import_transformers()
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16)
    x = {"input_ids": torch.randint(50, (2, 8))}
    small = intrafusion.compress(transformers.BertModel(config).eval(), x, ranks=0.5, restore=None)
    assert len(small.plan.ranks) == 7
    assert any("no configuration says that a layer is two; leave ranks out" in note for note in small.notes)
    assert ".expand" not in str(small.plan).partition("\n\n")[0]
    small.save(tmp_path / "small")
    loaded: Any = intrafusion.load(tmp_path / "small")
    torch.testing.assert_close(loaded(**x)[0], small.model(**x)[0])
    with pytest.raises(ModelError, match="save_pretrained: BertModel cannot be built from its BertConfig alone"):
        loaded.save_pretrained(tmp_path / "theirs")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "both"}, "expected True or 'only' beside a target, or a fraction"),
        ({"ranks": 1.0}, r"a fraction in \(0, 1\), got 1.0"),
        ({"ranks": 3}, r"a fraction in \(0, 1\), got 3"),
        ({"ranks": float("nan")}, "got nan"),
        ({"ranks": None}, "got None"),
        ({"ranks": {"first": 3}}, "expected True or 'only'"),
        ({"ranks": True}, "True lets a target choose; give target="),
        ({"ranks": "only", "keep": 0.5}, "'only' lets a target choose"),
        ({"ranks": 0.5, "target": {"macs": 0.5}}, "a target chooses ranks itself, got 0.5"),
        ({"ranks": 0.5, "uniform": True}, "goes without uniform"),
        ({"ranks": 0.5, "inplace": True}, "expected a copy to be made, got inplace=True"),
        ({"ranks": 0.5, "merge_heads": 2}, "merge_heads: goes without ranks"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        intrafusion.compress(Net(), X, **options)


def test_ranks_where_they_are_not_chosen() -> None:
    model = Net()
    with pytest.raises(RecipeError, match="ranks: layers become two in one step"):
        intrafusion.compress_in_steps(model, X, ranks=0.5)
    with pytest.raises(RecipeError, match="ranks: which layers become two is chosen by compress"):
        intrafusion.decide(model, intrafusion.inspect(model, X), Recipe.of(ranks=0.5))


class Unsplittable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.grouped = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.table.weight
        self.one = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.table(x).transpose(1, 2)).relu().transpose(1, 2)
        return self.one(self.head(x).relu())


@pytest.mark.parametrize("options", [{"ranks": 0.5}, {"ranks": "only", "target": {"macs": 0.5}}])
def test_a_network_without_layers_that_can_be_two_says_why(options: dict[str, Any]) -> None:
    model, x = Unsplittable().eval(), torch.randint(16, (2, 6))
    with pytest.raises(
        ModelError, match=r"no layer of this network can become two.*'grouped': its groups.*'head'.*one"
    ):
        intrafusion.compress(model, x, restore=None, **options)


def test_where_no_layer_can_be_two_fewer_channels_are_what_is_left() -> None:
    model, x = Unsplittable().eval(), torch.randint(16, (2, 6))
    small = intrafusion.compress(model, x, restore=None, target={"macs": 0.7}, ranks=True)
    assert small.after.macs <= 0.7 * small.before.macs
    assert not small.plan.split
    assert "ranks: no layer is worth two, so only channels are fewer." in small.notes


def test_layers_that_are_two_already_are_left_so(both: Compressed) -> None:
    small = intrafusion.compress(both.model, X, ranks=0.5, restore=None, inputs=IMAGES)
    assert not both.plan.ranks.keys() & small.plan.ranks.keys()
    assert ranks_of(small.model).keys() == {"first", "stem", "second", "head"}
    with pytest.raises(BudgetError, match="include"):
        intrafusion.compress(Net(), X, ranks=0.5, include=["nowhere"], restore=None)


def test_a_network_that_was_loaded_is_an_original_too(both: Compressed, tmp_path: Path) -> None:
    both.save(tmp_path / "first")
    small = intrafusion.compress(intrafusion.load(tmp_path / "first", Net), X, keep=0.7, restore=None)
    small.save(tmp_path / "second")
    loaded = intrafusion.load(tmp_path / "second", intrafusion.load(tmp_path / "first", Net))
    assert torch.equal(loaded(IMAGES), small.model(IMAGES))


def test_a_recipe_with_ranks_survives_yaml() -> None:
    for options in (
        {"ranks": True, "target": {"macs": 0.5}},
        {"ranks": "only", "target": {"macs": 0.5}},
        {"ranks": 0.5},
    ):
        recipe = Recipe.of(**options)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert recipe != Recipe()
    assert Recipe.of(ranks=0.5).keep == 1.0
    assert Recipe.of(ranks=0.5, keep=0.8).keep == 0.8


# ---- the command line -----------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_command_line_factorises(tmp_path: Path) -> None:
    done = run(
        *("compress", "zoo:digits_resnet", "--arg", "pretrained=false", "--ranks", "0.5", "--restore", "none"),
        *("-o", str(tmp_path / "small"), "--json"),
    )
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["after"]["params"] < 0.6 * data["before"]["params"]
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["split"]
    refused = run("compress", "zoo:digits_resnet", "--ranks", "some")
    assert refused.exit_code == 2
    assert "--ranks some: expected both, only, or a fraction" in refused.output
