"""A record: what was measured, on what, with which versions. One JSON object per line; a file only ever grows."""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.documents import parse_json
from intrafusion.errors import ArgumentError
from intrafusion.io.atomic import report_unreadable, report_unwritable
from intrafusion.io.locks import lock

# Words of settings, which experiments write and the report reads.
ORIGINAL = "original"  # the method of the network as it was
WHOLE, INNER = "whole network", "block-inner channels"  # scopes of more than one group

_PACKAGES = ("intrafusion", "torch", "numpy", "POT", "torch-pruning", "timm")


@checked
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

    __repr__ = show_briefly

    @property
    def key(self) -> str:
        return key_of(self.experiment, self.setting)


def key_of(experiment: str, setting: Mapping[str, Any]) -> str:
    try:
        return json.dumps([experiment, setting], sort_keys=True)
    except (TypeError, RecursionError) as error:
        raise ArgumentError(f"{experiment}: a setting has values that JSON does not have ({error}).") from error


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


@checked
def append_record(path: Path, record: Record) -> None:
    """Add one line in a single write, so that a kill leaves whole lines or none; several may write to one file.

    Raises:
        ArgumentError: the record has values that JSON does not have.
        FolderError: the file cannot be written; it is as it was.
    """
    line = _encode(asdict(record)).encode() + b"\n"
    with report_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with lock(path), path.open("ab", buffering=0) as file:
            _write_whole(file, line if not file.tell() or _ends_with_newline(path) else b"\n" + line)
            os.fsync(file.fileno())


def _write_whole(file: FileIO, line: bytes) -> None:
    """Write all, or leave the file as it was."""
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(size)
        raise


def _encode(value: Any) -> str:
    """JSON.

    Raises:
        ArgumentError: a value that JSON does not have.
    """
    try:
        return json.dumps(value)
    except (TypeError, RecursionError) as error:
        raise ArgumentError(f"expected values that JSON has, got others ({error}): {value!r:.200}.") from error


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


@checked
def read_records(path: Path) -> list[Record]:
    """Every whole line; a line that a kill cut short is passed over."""
    with report_unreadable(path):
        return parse_lines(path.read_bytes()) if path.is_file() else []


def parse_lines(lines: bytes) -> list[Record]:
    """The records in the lines that hold one."""
    return [record for line in lines.splitlines() if (record := _parse_line(line)) is not None]


def _parse_line(line: bytes) -> Record | None:
    try:
        record = Record(**parse_json(line))
    except (ValueError, TypeError):
        return None
    whole = all(isinstance(part, dict) for part in (record.setting, record.result, record.environment))
    return record if whole and isinstance(record.experiment, str) else None


@checked
def finished_keys(records: Iterable[Record]) -> set[str]:
    """Keys of what has been measured already."""
    return {record.key for record in records}
