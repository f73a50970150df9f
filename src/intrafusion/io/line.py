"""The line of Python that loads a folder, true in another directory and in another process."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.network.apart import forked_random_numbers
from intrafusion.network.tensors import named_tensors

_WITHOUT_CLASS = "what is saved with program=True loads without it"


def write_line(folder: str | os.PathLike[str], statements: str = "", original: str = "", *, trust: bool = False) -> str:
    """
    Args:
        statements: that give the original network its name, such as an import.
        original: the expression that builds it; none where the folder needs none.
        trust: that the program in the folder is to be loaded.

    >>> write_line("/net", "from mynet import Net", "Net")
    "import intrafusion; from mynet import Net; model = intrafusion.load('/net', Net)"
    """
    arguments = [repr(os.path.abspath(folder)), *([original] if original else []), *(["trust_program=True"] * trust)]
    return "; ".join(
        filter(None, ["import intrafusion", statements, f"model = intrafusion.load({', '.join(arguments)})"])
    )


def write_line_of(folder: str | os.PathLike[str], data: Mapping[str, Any], kind: type[nn.Module]) -> str:
    """The line for a folder that was just written, by what is in it and the class of the original network."""
    name = kind.__qualname__
    if data.get("source"):
        return write_line(folder)
    place = import_of(kind.__module__, name)
    if place and _builds(kind, data["shapes"]):
        return write_line(folder, place, name)
    if data.get("program"):
        return write_line(folder, trust=True)
    told = (
        "put its arguments in place of ..." if place else f"no import finds it, as it is of {kind.__module__}: paste it"
    )
    return f"{write_line(folder, place or '', f'lambda: {kind.__name__}(...)')}  # {name}: {told}; {_WITHOUT_CLASS}"


def import_of(module: str, name: str) -> str | None:
    """Statements after which a dotted name stands for what it is in an imported module; None if nothing does.

    The folder of a module that is not installed is searched first; what a script defines is read from its file.
    """
    found = sys.modules.get(module)
    path, spec = getattr(found, "__file__", None), getattr(found, "__spec__", None)
    if path is None or "<" in name:  # a notebook; defined inside a function
        return None
    module = spec.name if module == "__main__" and spec else module  # python -m
    file, parts, first = Path(path).resolve(), module.split("."), name.partition(".")[0]
    if file.stem not in (parts[-1], "__init__"):  # run as a script, or under a name of somebody's own
        return import_from_file(file, name)
    root = file.parents[len(parts) - (file.stem != "__init__")]
    search = "" if _is_installed(parts[0], file) else f"import sys; sys.path.insert(0, {str(root)!r}); "
    return f"{search}from {module} import {first}"


def import_from_file(file: Path, name: str) -> str:
    """The same for what a file defines, which may find the modules beside it."""
    file, name = file.resolve(), name.partition(".")[0]
    search = f"import sys; sys.path.insert(0, {str(file.parent)!r}); "
    if file.stem.isidentifier() and file.suffix == ".py":
        return f"{search}from {file.stem} import {name}"
    return f"{search}import runpy; {name} = runpy.run_path({str(file)!r})[{name!r}]"


def _is_installed(package: str, file: Path) -> bool:
    places = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    return any(file.is_relative_to(place) for place in places) or package in packages_distributions()


def _builds(kind: Callable[[], nn.Module], shapes: Mapping[str, Any]) -> bool:
    """Whether a class, called without arguments, gives the original network; tried on the meta device."""
    try:
        inspect.signature(kind).bind()
        with forked_random_numbers(), torch.device("meta"):
            found = {n: list(t.shape) for n, t in named_tensors(kind()).items() if t.is_floating_point()}
    except Exception:  # the user's code, which may need arguments, values or files
        return False
    return found == {name: list(shape) for name, shape in shapes.items()}
