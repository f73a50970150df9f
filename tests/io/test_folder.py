"""Saved folders: complete or absent, nothing pickled, and never trusted further than needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from bare import compress
from torch import Tensor, nn

import intrafusion
import intrafusion.io.folder as folder_module
from intrafusion import Compressed, FolderError, PlanError, load
from intrafusion.errors import IntrafusionError
from intrafusion.io.folder import load_plan, save_plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution with its norm, and two linear layers that share one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.module = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.head = nn.Linear(width, 2)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.module(x))).mean((2, 3)) * self.scale
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


class Inner(nn.Module):
    """Every name starts with "module."."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.fixture(scope="module")
def small() -> Compressed:
    torch.manual_seed(0)
    return compress(Net(), X, 0.5)


@pytest.fixture
def saved(small: Compressed, tmp_path: Path) -> Path:
    small.save(tmp_path / "net")
    return tmp_path / "net"


def change_plan(folder: Path, **entries: Any) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [Net, lambda: Net(), Net()], ids=["class", "factory", "instance"])
def test_loaded_it_computes_the_same(small: Compressed, saved: Path, original: Any) -> None:
    network = load(saved, original)
    assert network is original or not isinstance(original, nn.Module)
    assert torch.equal(network(X), small.model(X))
    assert network.module.out_channels == 4
    assert network.a.weight is network.b.weight
    assert [(n, p.requires_grad) for n, p in network.named_parameters()] == [
        (n, p.requires_grad) for n, p in small.model.named_parameters()
    ]


def small_recipe() -> intrafusion.Recipe:
    return intrafusion.Recipe.of(keep=0.5, reducer="intrafusion", restore=None)


def test_weights_that_are_computed_from_others_load(tmp_path: Path) -> None:
    """Their shape follows from what they are computed from, which is not yet written when sizes are checked."""
    norm = torch.nn.utils.parametrizations.weight_norm
    net, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), norm(nn.Linear(6, 2))).eval(), torch.randn(2, 3)
    small = intrafusion.compress(net, x, 0.5, restore=None)
    small.save(tmp_path / "net")
    torch.testing.assert_close(load(tmp_path / "net", net)(x), small.model(x))
    assert net[2].in_features == 3


class TwoSides(nn.Module):
    """Two groups of one width meet in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))


def test_groups_of_one_width_that_meet_in_a_layer_may_be_cut_differently(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compress(TwoSides().eval(), torch.randn(2, 3, 4, 4), keep={"a": 5 / 8, "b": 1 / 8})
    assert small.model.get_parameter("both.weight").shape == (4, 6, 1, 1)  # loses 3 and 7
    small.save(tmp_path / "small")
    found = load(tmp_path / "small", TwoSides)
    assert torch.equal(found.both.weight, small.model.get_parameter("both.weight"))


def test_the_folder_holds_these_files_and_no_pickle(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "model.safetensors", "plan.json", "recipe.yaml"]
    for path in saved.iterdir():
        assert b"\x80\x02" not in path.read_bytes()[:2]
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert tensors["module.weight"].shape == (4, 3, 3, 3)
    assert "b.weight" not in tensors, "a shared weight is stored once"
    assert intrafusion.Recipe.from_yaml((saved / "recipe.yaml").read_text()) == small_recipe()
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_twice_gives_the_same_bytes(small: Compressed, saved: Path, tmp_path: Path) -> None:
    small.save(tmp_path / "again")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_names_that_start_with_module_survive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compress(Inner(), X, 0.5)
    small.save(tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", Inner)(X), small.model(X))


def test_saved_dtype_and_mode_of_the_original(tmp_path: Path) -> None:
    small = compress(Net().bfloat16(), X.bfloat16(), 0.5)
    small.save(tmp_path / "net")
    network = load(tmp_path / "net", Net().train())
    assert network.training
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_the_users_own_importance_does_not_stop_loading(tmp_path: Path) -> None:
    small = compress(Net(), X, 0.5, importance=lambda group, weights, seen: torch.arange(group.size))
    small.save(tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", lambda: Net())(X), small.model(X))


def test_a_loaded_network_can_be_compressed_and_saved_again(saved: Path, tmp_path: Path) -> None:
    again = compress(load(saved, Net), X, 0.5)
    again.save(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", lambda: load(saved, Net))(X), again.model(X))
    with pytest.raises(PlanError, match="the plan is for another network"):
        load(tmp_path / "again", Net)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("step", ["save_file", "_build_document"])
def test_an_interrupted_save_leaves_nothing_or_the_old_folder(
    small: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, exists: bool
) -> None:
    target = tmp_path / "net"
    if exists:
        small.save(target)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, step, fail)
    with pytest.raises(KeyboardInterrupt):
        small.save(target)
    assert target.exists() == exists
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_old_folder_of_ours_is_replaced_and_a_foreign_one_is_not(
    small: Compressed, saved: Path, tmp_path: Path
) -> None:
    (saved / "model.safetensors").write_bytes(b"old")
    small.save(saved)
    assert torch.equal(load(saved, Net)(X), small.model(X))
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "plan.json").write_text('{"kind": "heist"}')
    for write in (small.save, lambda f: save_plan(small.plan, f)):
        with pytest.raises(FolderError, match="holds files that intrafusion did not write"):
            write(foreign)
    assert (foreign / "plan.json").read_text() == '{"kind": "heist"}'


# ---- reading what must not be trusted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "..\\x", "a/../../x"]
)
def test_weights_outside_of_the_folder(saved: Path, name: str) -> None:
    (saved.parent / "other.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    change_plan(saved, weights=name)
    with pytest.raises(FolderError, match="points outside the folder; refused"):
        load(saved, Net)


def test_a_link_out_of_the_folder(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.rename(saved.parent / "elsewhere.safetensors")
    weights.symlink_to(saved.parent / "elsewhere.safetensors")
    with pytest.raises(FolderError, match="is a link out of the folder; refused"):
        load(saved, Net)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "plan.json"), "plan.json: damaged, not JSON"),
        (lambda f: (f / "plan.json").write_text("[]"), "this is not a plan of intrafusion"),
        (lambda f: (f / "plan.json").write_text("{}"), "this is not a plan of intrafusion"),
        (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe\x00"), "plan.json: damaged, not JSON"),
        (lambda f: (f / "plan.json").unlink(), "expected a folder saved by intrafusion, but it has no plan.json"),
        (lambda f: cut(f / "model.safetensors"), "model.safetensors: not a safetensors file, or a damaged one"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: change_plan(f, weights=None), "names no weight file; this is a plan alone"),
        (lambda f: change_plan(f, decisions=None), "this is not a plan of intrafusion"),
        (lambda f: change_plan(f, format=3), "has format 3, this version reads up to 2"),
    ],
)
def test_damaged_folders(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(IntrafusionError, match=message):
        load(saved, Net)


def test_no_folder_and_a_file(saved: Path) -> None:
    for path in (saved / "nothing", saved / "recipe.yaml"):
        with pytest.raises(FolderError, match="expected a folder saved by intrafusion"):
            load(path, Net)


REPAIR = {"module": "module", "attribute": "out_channels", "old": 8, "new": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"attribute": "training"},
        {"attribute": "forward"},
        {"attribute": "__class__"},
        {"attribute": "weight"},
        {"attribute": "padding_mode"},
        {"attribute": "no_such"},
        {"module": "nowhere"},
        {"new": "4"},
        {"new": True},
        {"new": None},
        {"new": [4, "x"]},
        {"old": 7},
        {"module": ["module"]},
        {"attribute": 3},
    ],
    ids=str,
)
def test_repairs_that_are_no_sizes(saved: Path, change: dict[str, Any]) -> None:
    change_plan(saved, repairs=[REPAIR | change])
    network = Net()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(PlanError, match=r"plan.json: "):
        load(saved, network)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("repairs", [[3], [{}], ["out_channels"]])
def test_repairs_of_another_form(saved: Path, repairs: Any) -> None:
    change_plan(saved, repairs=repairs)
    with pytest.raises(PlanError, match="plan.json: damaged, .* is no repair of this network"):
        load(saved, Net)


def test_another_original(saved: Path) -> None:
    with pytest.raises(PlanError, match=r"'module.weight' is \[8, 3, 3, 3\] there and \[9, 3, 3, 3\] here"):
        load(saved, lambda: Net(9))
    with pytest.raises(PlanError, match="it has 'module.weight' .* this one has no such tensor"):
        load(saved, lambda: nn.Linear(2, 2))
    with pytest.raises(PlanError, match="expected a network or a factory of one, got a factory of int"):
        load(saved, lambda: 3)  # type: ignore[arg-type, return-value]


def test_weights_of_another_network(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    tensors["hed.weight"] = tensors.pop("head.weight")
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(PlanError, match=r"missing \['head.weight'\], unexpected \['hed.weight'\]"):
        load(saved, Net)


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_a_network_is_no_plan_and_a_plan_is_no_network(small: Compressed, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="it holds a network .*, not a plan to apply"):
        load_plan(saved)
    save_plan(small.plan, tmp_path / "plan")
    with pytest.raises(FolderError, match="names no weight file; this is a plan alone"):
        load(tmp_path / "plan", Net)


def test_a_plan_with_damaged_maps(small: Compressed, tmp_path: Path) -> None:
    save_plan(small.plan, tmp_path / "plan")
    cut(tmp_path / "plan" / "maps.safetensors")
    with pytest.raises(FolderError, match="maps.safetensors: not a safetensors file, or a damaged one"):
        load_plan(tmp_path / "plan")


def test_a_plan_of_one_channel_is_saved(tmp_path: Path) -> None:
    plan = compress(Net(), X, 0.125, reducer="select").plan
    assert 1 in plan.sizes.values()
    save_plan(plan, tmp_path / "plan")
    assert load_plan(tmp_path / "plan") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"merge/module": m["merge/module"][:, :-1]}, "module: expected a merge of finite float64"),
        (lambda m: m | {"unmerge/module": m["unmerge/module"] * torch.nan}, "module: expected a unmerge of finite"),
        (lambda m: m | {"merge/module": m["merge/module"].float()}, "module: expected a merge of finite float64"),
        (lambda m: {k: v for k, v in m.items() if not k.endswith("/module")}, "'module' is in one of them only"),
        (lambda m: {k: v for k, v in m.items() if k != "merge/module"}, "maps.safetensors: damaged, .*'merge'"),
        (lambda m: m | {"merge/module": m["merge/module"] + 1}, "maps.safetensors: is not what was saved"),
        (lambda m: m | {"other/module": m["merge/module"].clone()}, "maps.safetensors: damaged, .*'other'"),
    ],
)
def test_maps_that_are_not_those_of_the_plan(
    small: Compressed, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    save_plan(small.plan, tmp_path / "plan")
    path = tmp_path / "plan" / "maps.safetensors"
    changed = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path)
    with pytest.raises(IntrafusionError, match=message):
        load_plan(tmp_path / "plan")


# ---- what is refused before anything is written ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"repairs": [REPAIR | {"new": 10**9}]}, "module.out_channels would become 1000000000 from 8"),
        ({"repairs": []}, "a.in_features = 8 contradicts its tensors"),
        ({"repairs": 3}, "repairs is no list"),
        ({"split_after": {"module": 10**9}}, "'module' cannot have rank 1000000000: it has 8 outputs"),
        ({"split_after": [1]}, "split_after is no table of ranks"),
        ({"split_before": {"module": "two"}}, "module: expected a rank of at least 1, got 'two'"),
        ({"format": "1"}, "expected a whole number, got '1'"),
        ({"recipe": "seed: x"}, "seed: expected a whole number .*, got 'x'"),
        ({"notes": ["other"]}, "plan.json: is not what was saved"),
    ],
    ids=str,
)
def test_entries_of_the_wrong_kind_or_size(saved: Path, entries: dict[str, Any], message: str) -> None:
    change_plan(saved, **entries)
    with pytest.raises(IntrafusionError, match=message):
        load(saved, Net)


def test_one_flipped_bit_in_the_weights_is_seen(saved: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(FolderError, match="model.safetensors: is not what was saved, its SHA-256 is"):
        load(saved, Net)


@pytest.mark.parametrize("make", [lambda: Net().to("meta"), lambda: nn.Sequential(nn.LazyLinear(3))])
def test_networks_without_values(saved: Path, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(IntrafusionError, match="of the network has no dense values|is not initialised yet"):
        load(saved, make())


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.eye(2).to_sparse()])
def test_tensors_that_no_file_holds(small: Compressed, tmp_path: Path, tensor: Tensor) -> None:
    model = Net()
    model.register_buffer("odd", tensor)
    with pytest.raises(IntrafusionError, match="save: 'odd' has no dense values"):
        replace(small, model=model).save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_long_names_and_no_networks(saved: Path) -> None:
    with pytest.raises(FolderError, match="cannot be read .File name too long"):
        load("x" * 300, Net)
    with pytest.raises(IntrafusionError, match="expected a network, its class or a factory of it, got a int"):
        load(saved, 3)  # type: ignore[arg-type]
    with pytest.raises(IntrafusionError, match="cannot be called without arguments.*give a factory"):
        load(saved, nn.Linear)


def test_what_was_saved_in_evaluation_mode_is_built_in_it(tmp_path: Path) -> None:
    make = lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
    small = intrafusion.compress(make().eval(), torch.randn(2, 4), 0.5, restore=None)
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", make)
    assert not loaded.training
    assert torch.equal(loaded(torch.ones(1, 4)), small.model(torch.ones(1, 4)))
    assert intrafusion.load(tmp_path / "small", make().train()).training


def test_what_is_loaded_lies_in_memory_as_a_new_network_does(tmp_path: Path) -> None:
    """Kernels round otherwise where memory begins elsewhere, and a file that is mapped stays open."""
    net, x = nn.Sequential(nn.Conv1d(1, 9, 2), nn.ReLU(), nn.Conv1d(9, 3, 1)).eval(), torch.randn(2, 1, 20)
    small = intrafusion.compress(net, x, 0.5, restore=None)
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", net)
    assert all(t.data_ptr() % 64 == 0 for t in loaded.state_dict().values())
    assert torch.equal(loaded(x), small.model(x))
