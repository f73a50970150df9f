"""Weights of one network in several safetensors files: each read when it is asked for, and written as it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.documents import parse_json
from intrafusion.errors import FolderError
from intrafusion.io.atomic import report_unreadable
from intrafusion.names import name_some

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor, where it lies.

    dtype: as safetensors names it, such as "BF16".
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Shards:
    """What a folder holds; only the heads of its files have been read."""

    folder: Path
    tensors: Mapping[str, Stored]

    __repr__ = show_briefly

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """
        Raises:
            FolderError: no weights in safetensors, a damaged index or file, or a file of the index that is not there.
        """
        with report_unreadable(folder):
            places = _read_index(folder)
            files = sorted(set(places.values()) or {_WHOLE})
            found = {name: stored for file in files for name, stored in _read_head(folder / file).items()}
        lost = [name for name, file in places.items() if name not in found or found[name].file.name != file]
        if lost:
            raise FolderError(f"{folder}: {_INDEX} names {name_some(lost)}, not found there; fetch the folder again.")
        return cls(folder, found)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor, in memory of its own."""
        return self.map(name).clone()

    def map(self, name: str) -> Tensor:
        """One tensor as it lies in its file, of which the system keeps as much in memory as it likes.

        Raises:
            FolderError: its file is damaged, or has gone.
        """
        try:
            with safe_open(self.tensors[name].file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            if "allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise FolderError(f"{self.tensors[name].file}: {name} cannot be read ({error}); fetch it again.") from error


def _read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor; empty where all are in one."""
    path = folder / _INDEX
    if not path.is_file():
        if not (folder / _WHOLE).is_file():
            raise FolderError(
                f"{folder}: expected {_WHOLE} or {_INDEX}, got neither; weights in other files are converted by "
                "from_pretrained(folder).save_pretrained(another)."
            )
        return {}
    try:
        places = {str(name): str(file) for name, file in parse_json(path.read_bytes())["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FolderError(
            f"{path}: expected the file of every tensor as weight_map ({error}); fetch it again."
        ) from error
    for file in sorted(set(places.values())):
        if PurePosixPath(file).name != file or "\\" in file or "\0" in file:
            raise FolderError(f"{path}: its file {file!r} lies outside the folder; refused.")
        if not (folder / file).is_file():
            count = sum(place == file for place in places.values())
            raise FolderError(f"{folder}: {file} is not there, with {count} of its tensors; fetch the folder again.")
    return places


def _read_head(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return {name: Stored(path, tuple(p.get_shape()), str(p.get_dtype())) for name, p in parts.items()}
    except (SafetensorError, RuntimeError, ValueError) as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise FolderError(f"{path}: not a safetensors file, or a damaged one ({error}); fetch it again.") from error


@dataclass(eq=False)
class ShardWriter:
    """Writes a network in `count` files, one after another, and the index of them at the end."""

    folder: Path
    count: int
    places: dict[str, str] = field(default_factory=dict)
    size: int = 0
    written: int = 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """The next file."""
        self.written += 1
        name = f"model-{self.written:05}-of-{self.count:05}.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, self.folder / name, {"format": "pt"})
        self.places |= dict.fromkeys(tensors, name)
        self.size += sum(t.nbytes for t in tensors.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(self.places.items()))}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2))


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Kinds of numbers that layers can be solved in, as safetensors names them."""
