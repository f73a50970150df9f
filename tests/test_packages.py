"""The wheel holds what is needed and no more, and its types mean something to those who use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER = """
import torch
import intrafusion

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
small = intrafusion.compress(model, torch.randn(2, 4), keep=0.5, restore=None)
reveal_type(small.model)
reveal_type(small.after.params)
reveal_type(small.plan.decisions[0].m)
reveal_type(intrafusion.inspect(model, torch.randn(2, 4)).groups[0].size)
reveal_type(intrafusion.load("folder", model))
reveal_type(small.export("net.pt2").difference)
intrafusion.compress(model, torch.randn(2, 4), reducer=3)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("needs hatchling, or an index that has it")
    assert done.returncode == 0, done.stderr
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    place = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    return place


@pytest.mark.slow
def test_the_wheel_is_the_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    source = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "intrafusion").rglob("*") if p.is_file()}
    assert names == {name for name in source if "__pycache__" not in name}
    assert "intrafusion/py.typed" in names


@pytest.mark.slow
def test_it_runs_outside_of_the_repository(installed: Path, tmp_path: Path) -> None:
    code = "import intrafusion; from intrafusion.cli.main import app; print(intrafusion.__file__); app(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    where, version = done.stdout.split()
    assert where.startswith(str(installed))
    assert f"-{version}-" in next(p.name for p in installed.parent.glob("*.whl"))


@pytest.mark.slow
def test_types_are_known_from_outside(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyright", reason="needs pyright")
    (tmp_path / "user.py").write_text(USER)
    settings = {"extraPaths": [str(installed)], "pythonVersion": "3.11", "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)["generalDiagnostics"]
    types = [d["message"].rpartition(" is ")[2].strip('"') for d in told if d["severity"] == "information"]
    assert types == ["Module", "int", "int", "int", "Module", "float"]
    errors = [d for d in told if d["severity"] == "error"]
    assert [d["range"]["start"]["line"] for d in errors] == [len(USER.splitlines()) - 1], errors
    assert '"Literal[3]"' in errors[0]["message"]
