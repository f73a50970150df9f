"""Download a file over HTTP(S): all of it and verified, or nothing."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError, FolderError, IntrafusionError
from intrafusion.io.atomic import atomic_file

DownloadProgress = Callable[[int, int | None], None]
"""Called with the bytes received so far and the bytes expected (None if the server does not say)."""

_CHUNK = 1 << 18


@checked
def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    progress: DownloadProgress | None = None,
    timeout_s: float = 30.0,
) -> Path:
    """Download `url` to `path` and return `path`; a file that is there is kept, unless its checksum is another.

    The bytes go to a temporary file beside `path`, which takes its place only when complete and verified.

    Raises:
        ArgumentError: not an http or https address.
        IntrafusionError: the server cannot be reached or answers with an error.
        FolderError: fewer bytes than announced, or another checksum than expected.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ArgumentError(f"expected an http or https address, got {url!r}.")
    if path.is_file() and (sha256 is None or _sha256(path) == sha256):
        return path
    with atomic_file(path) as part:
        _fetch(url, part, progress, timeout_s)
        if sha256 is not None and (found := _sha256(part)) != sha256:
            raise FolderError(f"{url}: expected SHA-256 {sha256}, got {found}; nothing was kept, check the address.")
    return path


def _fetch(url: str, part: Path, progress: DownloadProgress | None, timeout_s: float) -> None:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response, part.open("wb") as file:
            announced = response.headers["Content-Length"]
            total = None if announced is None else int(announced)
            received = _copy(response, file, total, progress)
    except (OSError, HTTPException) as error:
        raise IntrafusionError(f"{url}: cannot be downloaded ({error}); check the address and the network.") from error
    if total is not None and received != total:
        raise FolderError(f"{url}: expected {total} bytes, got {received}; nothing was kept, try again.")


def _copy(response: BinaryIO, file: BinaryIO, total: int | None, progress: DownloadProgress | None) -> int:
    received = 0
    while chunk := response.read(_CHUNK):
        file.write(chunk)
        received += len(chunk)
        if progress is not None:
            progress(received, total)
    return received


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
