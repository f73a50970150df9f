"""A user's folder with a network of their own, and the program called in it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer.testing
from click.testing import Result
from typer.testing import CliRunner

from intrafusion.cli.main import app

SOURCE = """
import torch
from torch import nn

print("a word from the network")

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 6)
        self.third = nn.Linear(6, 3)
        self.width = width

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())

class Literal(Net):
    def forward(self, x):
        return self.third(self.second(self.first(x).relu().view(-1, 8)).relu())

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(2, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, ids, *, mask):
        return self.down(self.up(self.words(ids)).relu()) * mask[..., None]
"""


@pytest.fixture(scope="session", autouse=True)
def _built_once() -> Iterator[None]:
    """The program is read off the signatures of its commands once, not for every line: that is half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


@pytest.fixture(scope="session")
def option_script() -> ModuleType:
    """docs/cli_options.py, which reads the options of all commands."""
    path = Path(__file__).parents[2] / "docs" / "cli_options.py"
    spec = importlib.util.spec_from_file_location("cli_options", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which holds nets.py."""
    (tmp_path / "nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for variable in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def program(user_folder: Path) -> Callable[[str], Result]:
    """Runs a command line, with standard output and standard error apart."""

    def run(line: str) -> Result:
        return CliRunner().invoke(app, line.split())

    return run
