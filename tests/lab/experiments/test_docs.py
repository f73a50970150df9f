"""The Python of docs/experiments.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

DOCS = Path(__file__).parents[3] / "docs" / "experiments.md"


def test_the_example_measures_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope = {
        "model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(),
        "example": torch.randn(2, 4),
        "images": torch.randn(20, 4),
        "labels": torch.randint(3, (20,)),
    }
    exec(code, scope)
    assert [(r.setting["keep"], r.setting["method"]) for r in scope["records"]] == [
        (1.0, "original"),
        (0.9, "select"),
        (0.9, "intrafusion"),
        (0.7, "select"),
        (0.7, "intrafusion"),
    ]
    assert (tmp_path / "mine.jsonl").is_file()


def test_it_lists_every_experiment() -> None:
    from intrafusion.lab.experiments import EXPERIMENTS

    listed = re.findall(r"^\| `([a-z-]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert listed == list(EXPERIMENTS)
