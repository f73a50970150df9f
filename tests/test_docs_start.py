"""The code of the pages for newcomers runs, in the order in which one reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import intrafusion
from intrafusion.cli.main import app

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if kind == language]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the first page defines, after it was followed to its end."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "start"}
    for code in blocks("start.md"):
        exec(code.replace("256, 3, 32, 32", "64, 3, 8, 8").replace("1, 3, 32, 32", "1, 3, 8, 8"), names)
    return names


def test_five_minutes(started: dict[str, Any], tmp_path: Path) -> None:
    assert started["small"].after.macs <= 0.5 * started["small"].before.macs
    assert isinstance(started["model"], nn.Module)
    assert {p.name for p in tmp_path.iterdir()} == {"mynet-small", "mynet.pt2"}


def test_the_pipeline_step_by_step(started: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("pipeline.md")
    exec(code, started)
    assert "stem" in capsys.readouterr().out
    assert started["small"].after.params < started["small"].before.params


def test_the_shell_of_five_minutes(started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from safetensors.torch import save_file

    pytest.importorskip("onnxruntime", reason="needs intrafusion[onnx]")
    source = next(code for code in blocks("start.md") if "class MyNet" in code)
    (tmp_path / "mynet.py").write_text(source.partition("model = ")[0])
    save_file(started["MyNet"]().state_dict(), "mynet.safetensors")
    np.save("images.npy", started["images"].numpy())
    for line in next(code for code in blocks("start.md", "") if "compress" in code).splitlines():
        done = CliRunner().invoke(app, line.replace("1,3,32,32", "1,3,8,8").split()[1:])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "mynet.onnx").exists()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.norm = 4, nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def test_attention() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Block(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    names = {"intrafusion": intrafusion, "model": model, "example": torch.randn(1, 5, 6)}
    names["images"] = torch.randn(64, 5, 6)
    (code,) = blocks("attention.md")
    exec(code, names)
    assert names["small"].after.params <= 0.6 * names["small"].before.params
    cut = {d.group for d in names["heads"].plan.decisions if d.reduced}
    assert cut
    assert all(name.endswith(":blocks") for name in cut)
