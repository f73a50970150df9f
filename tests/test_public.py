"""Public names are what they say, and importing the library stays light."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import intrafusion


def test_every_public_name_is_there() -> None:
    assert len(set(intrafusion.__all__)) == len(intrafusion.__all__)
    assert set(intrafusion.__all__) <= set(dir(intrafusion))
    assert all(getattr(intrafusion, name) is not None for name in intrafusion.__all__)


@pytest.mark.parametrize("name", sorted(intrafusion.__all__))
def test_no_public_name_hides_a_module(name: str) -> None:
    if find_spec(f"intrafusion.{name}") is not None:
        assert isinstance(getattr(intrafusion, name), ModuleType), f"intrafusion.{name} hides the module of this name"


@pytest.mark.parametrize(
    "package", [m.name for m in pkgutil.walk_packages(intrafusion.__path__, "intrafusion.") if m.ispkg]
)
def test_no_function_hides_the_file_of_its_name(package: str) -> None:
    room = importlib.import_module(package)
    for file in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{package}.{file.name}")
        assert isinstance(getattr(room, file.name), ModuleType), f"{package}.{file.name} hides the file of this name"


def test_modules_are_what_their_names_give_and_the_checks_are_imported_only_when_they_are_named() -> None:
    code = "import sys, intrafusion; print('intrafusion.checks' in sys.modules, 'checks' in dir(intrafusion))\n"
    for name in ("trace", "checks"):
        code += f"m = intrafusion.{name}; import intrafusion.{name} as n; print(n.__name__, m is n)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False True", "intrafusion.trace True", "intrafusion.checks True"]


def test_a_name_is_imported_when_it_is_first_used() -> None:
    count = "sum(name.startswith('intrafusion') for name in sys.modules)"
    code = f"import torch, sys, intrafusion; print({count}); intrafusion.errors; print({count} < 10)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_public_name_can_be_the_first_that_is_used() -> None:
    homes = {getattr(getattr(intrafusion, name), "__module__", name): name for name in intrafusion.__all__}
    code = f"""
import os, torch, numpy, intrafusion
for name in {sorted(homes.values())}:
    if not (child := os.fork()):
        getattr(intrafusion, name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
intrafusion.Recipe.of(keep=0.5, reducer="fold", importance="l2", restore="noise")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_no_library_that_is_not_always_needed() -> None:
    later = ("timm", "transformers", "torchvision", "ray", "onnx", "onnxruntime", "onnxscript", "accelerate", "plotly")
    later += ("matplotlib", "PIL", "sklearn", "scipy", "ot", "typer", "rich", "mkdocs")
    names = "; ".join(f"intrafusion.{name}" for name in intrafusion.__all__ if name not in ("checks", "lab"))
    code = "import torch, sys; before = set(sys.modules); import intrafusion; "
    code += f"{names}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint(later)


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'intrafusion' has no attribute 'carry_out'"):
        intrafusion.carry_out  # type: ignore[attr-defined]  # noqa: B018


def test_one_version_in_three_places() -> None:
    root = Path(__file__).parents[1]
    built = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    cited = next(x for x in (root / "CITATION.cff").read_text().splitlines() if x.startswith("version:"))
    assert built == cited.split()[1] == intrafusion.__version__
    assert f"\n## {built}\n" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
