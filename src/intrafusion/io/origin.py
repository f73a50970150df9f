"""What a folder says of the network that it was made from, and by what."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from intrafusion.errors import ModelError, PlanError
from intrafusion.io.program import PROGRAM
from intrafusion.network.identity import Identity, describe_layers
from intrafusion.network.provenance import Source
from intrafusion.network.sources import SourceKind

_PACKAGES = {SourceKind.HF: "transformers", SourceKind.ZOO: "intrafusion"}
_SHOWN = 3


def describe_origin(original: Identity, source: Source | None) -> dict[str, Any]:
    """Entries of plan.json. The date is a day, so that saving twice gives the same bytes."""
    packages = ["intrafusion", "torch", *([_PACKAGES.get(source.kind, source.kind.value)] if source else [])]
    return {
        "original": asdict(original),
        "source": asdict(source) if source else None,
        "made_with": {name: _find_version(name) for name in packages} | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))),
    }


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def read_source(folder: Path, data: Mapping[str, Any]) -> Source:
    """The source that a folder records.

    Raises:
        ModelError: there is none; says how to load it.
        PlanError: it is damaged.
    """
    entry = data.get("source")
    if entry is None:
        raise ModelError(_tell_how_to_load(folder, data))
    try:
        kind, name, args = SourceKind(entry["kind"]), entry["name"], entry["args"]
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{folder}: damaged, its source is none that intrafusion knows ({error}).") from error
    if not (isinstance(name, str) and isinstance(args, dict) and len(entry) == 3):
        raise PlanError(f"{folder}: damaged, its source has no name and arguments.")
    return Source(kind, name, args)


def _tell_how_to_load(folder: Path, data: Mapping[str, Any]) -> str:
    name = _read_original(folder, data).get("name", "of its original")
    short = name.rpartition(".")[2] if "original" in data else "MyNet"
    program = (
        f" Or trust_program=True, where you trust who wrote the folder: that loads its {PROGRAM}, which can run code."
        if data.get("program")
        else ""
    )
    return (
        f"{folder}: holds weights, not the code of its network. Give the class {name}: "
        f"intrafusion.load({str(folder)!r}, {short}), or a factory (lambda: {short}(...)), or an instance.{program}"
    )


def _read_original(folder: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Empty in folders of before it was recorded."""
    found = data.get("original") or {}
    layers = found.get("layers", {}) if isinstance(found, dict) else None
    if not (isinstance(layers, dict) and all(isinstance(v, str) for v in (found.get("name", ""), *layers.values()))):
        raise PlanError(f"{folder}: damaged, what it says of its original is no name and layers.")
    return found


def find_other_layers(folder: Path, data: Mapping[str, Any], network: nn.Module) -> dict[str, str]:
    """A warning, if there is one. Other weights in the network given do not matter, all are replaced; layers do.

    Raises:
        PlanError: what it says of its original is damaged.
    """
    there = _read_original(folder, data).get("layers")
    if there is None:
        return {}
    here = describe_layers(network)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if not names:
        return {}
    told = "; ".join(f"{n or 'itself'}: {there.get(n)} there, {here.get(n)} here" for n in islice(names, _SHOWN))
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return {
        "layers": f"{folder}: made from a network of other layers ({told}{more}), so it may compute something else. "
        f"Give the class and arguments that it was saved with; it was made with {data.get('made_with')}."
    }
