"""Extra state of modules is kept by save and load, without a pickle, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion import FolderError, PlanError, compress, load
from intrafusion.io.checksums import KEY

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
STATE = {"factor": 3.0, "list": [1, (2, "a", None)], "tensor": {"x": torch.arange(3)}, "inf": float("inf"), "on": True}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state: Any = {"factor": 1.0}

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        state["factor"] * 1.0
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return x * self.state["factor"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = nn.Linear(8, 32), Scale(), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.s(F.relu(self.a(x))))


def saved(state: Any, folder: Path) -> nn.Module:
    model = Net().eval()
    model.s.state = state
    small = compress(model, X, 0.5, restore=None)
    small.save(folder)
    return small.model


def test_extra_state_comes_back(tmp_path: Path) -> None:
    small = saved(STATE, tmp_path / "s")
    network = load(tmp_path / "s", Net).eval()
    assert torch.equal(network(X), small(X))
    found = network.s.state
    assert torch.equal(found["tensor"].pop("x"), torch.arange(3))
    assert found == {**STATE, "tensor": {}}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {1: 2}])
def test_what_only_a_pickle_could_keep_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="s: its extra state holds a .*, which only a pickle could keep"):
        saved({"factor": 1.0, "more": value}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "damage", [3, {"nobody": 1}, {"s": {"dict": {}}}, {"s": {"tensor": "gone"}}, {"s": {"set": []}}, {"s": {}}]
)
def test_damaged_extra_state_is_refused_and_leaves_the_network(damage: Any, tmp_path: Path) -> None:
    saved(STATE, tmp_path / "s")
    path = tmp_path / "s" / "plan.json"
    data = json.loads(path.read_text())
    del data[KEY]  # or the checksum would say so first
    path.write_text(json.dumps({**data, "extra_state": damage}))
    model = Net()
    with pytest.raises(PlanError, match="extra state"):
        load(tmp_path / "s", model)
    assert model.s.state == {"factor": 1.0}
    assert model.a.out_features == 32


def test_folders_from_before_have_none(tmp_path: Path) -> None:
    saved({"factor": 1.0}, tmp_path / "s")
    path = tmp_path / "s" / "plan.json"
    data = json.loads(path.read_text())
    del data["extra_state"], data[KEY]
    path.write_text(json.dumps(data))
    assert load(tmp_path / "s", Net).s.state == {"factor": 1.0}
