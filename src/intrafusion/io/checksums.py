"""What was written is what is read: SHA-256 of the files of a saved folder, kept in its plan.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intrafusion.errors import FolderError

KEY = "sha256"


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_document(data: Mapping[str, Any]) -> str:
    """Of all entries but the checksums; of the values, however they are set."""
    rest = {key: value for key, value in data.items() if key != KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_digests(folder: Path, data: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Compare with the checksums in a document; folders of before there were any have none.

    Raises:
        FolderError: a file is not what was saved.
    """
    kept = data.get(KEY)
    if kept is None:
        return
    for name, digest in found.items():
        if not isinstance(kept, Mapping) or kept.get(name) != digest:
            raise FolderError(
                f"{folder / name}: is not what was saved, its SHA-256 is {digest}; fetch or save the folder again. "
                f"If you changed it on purpose, remove {KEY!r} from its plan.json."
            )
