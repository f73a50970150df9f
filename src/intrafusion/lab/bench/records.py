"""A record: what was measured, on what, with which versions. One JSON object per line; a file only ever grows."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Words of settings, which experiments write and the report reads.
ORIGINAL = "original"  # the method of the network as it was
WHOLE, INNER = "whole network", "block-inner channels"  # scopes of more than one group

_PACKAGES = ("intrafusion", "torch", "numpy", "POT", "torch-pruning", "timm")


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        experiment: the script or experiment that made it.
        setting: what was varied; two records with equal experiment and setting are the same measurement.
        result: the numbers, accuracies in [0, 1], units in the names.
        environment: versions, hardware and time.
    """

    experiment: str
    setting: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=lambda: environment())

    @property
    def key(self) -> str:
        return key_of(self.experiment, self.setting)


def key_of(experiment: str, setting: Mapping[str, Any]) -> str:
    return json.dumps([experiment, setting], sort_keys=True)


def environment() -> dict[str, Any]:
    """Versions of what matters, and the machine."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def append_record(path: Path, record: Record) -> None:
    """Add one line in a single write, so that a kill leaves whole lines or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(record)) + "\n"
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_records(path: Path) -> list[Record]:
    """Every whole line; a line that a kill cut short is passed over."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def finished_keys(records: Iterable[Record]) -> set[str]:
    """Keys of what has been measured already."""
    return {record.key for record in records}
