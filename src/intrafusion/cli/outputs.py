"""Where results go, checked before the work is done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from intrafusion.cli.console import messages
from intrafusion.cli.network import Network
from intrafusion.compressed import Compressed
from intrafusion.errors import FolderError, ModelError
from intrafusion.io.atomic import report_unwritable
from intrafusion.io.folder import is_ours
from intrafusion.io.pretrained import check_apart
from intrafusion.io.program import export_network
from intrafusion.lab.bench import read_records
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.surgery.configuration import is_loadable


def check_saving(folder: Path) -> None:
    """Refuse a folder that saving a network would refuse.

    Raises:
        FolderError: it is a file, holds what intrafusion did not write, or cannot be written.
    """
    check_writable(folder)
    taken = folder.exists() and not is_ours(folder)
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder}: exists and was not written by intrafusion; choose another name, or move it away.")


def check_program(folder: Path | None, network: nn.Module, inputs: Inputs) -> None:
    """
    Raises:
        ModelError: there is no folder to keep a program in, or `torch.export` does not take the network.
    """
    if folder is None:
        raise ModelError("--program: expected a folder to keep it in; give one with -o.")
    with _report_program():
        export_network(network, inputs)


@contextmanager
def _report_program() -> Iterator[None]:
    """Say what is not exported in words of the command line."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("save: program=True, but", "--program:")) from error


def save_network(small: Compressed, folder: Path, *, program: bool, pretrained: Path | None = None) -> None:
    """Where `from_pretrained` turns out not to open the network, that is said, and the work is not lost.

    Raises:
        ModelError: the smaller network is not exported, as its original was; it is saved all the same.
    """
    try:
        with _report_program():
            small.save(folder, program=program, pretrained=pretrained)
    except ModelError as error:
        if pretrained is not None:
            messages.print(f"note: intrafusion.load is needed: {error}", soft_wrap=True)
            return save_network(small, folder, program=program)
        if not program:
            raise
        small.save(folder)
        raise ModelError(f"{error} {folder} was written without it.") from error


def save_result(small: Compressed, folder: Path, network: Network, *, program: bool = False) -> None:
    """In the format of Hugging Face too, where the network came in it and its configuration can say the sizes.

    Raises:
        ModelError: as `save_network`.
    """
    opens = network.folder is not None and is_loadable(small.model)
    save_network(small, folder, program=program, pretrained=network.folder if opens else None)


def check_folder(folder: Path) -> None:
    """
    Raises:
        FolderError: it is a file, or cannot be written.
    """
    check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder}: expected a folder, but this is a file; choose another name with -o.")


def check_file(path: Path) -> None:
    """
    Raises:
        FolderError: it is a folder, or cannot be written.
    """
    check_writable(path)
    if path.is_dir():
        raise FolderError(f"{path}: expected the name of a file, but this is a folder; choose another name with -o.")


def check_records(path: Path) -> None:
    """
    Raises:
        FolderError: it is a folder, a file of something else, or cannot be written.
    """
    check_file(path)
    if path.exists() and path.stat().st_size and not read_records(path):
        raise FolderError(f"{path}: exists and holds no records; choose another name with -o, or move it away.")


def check_page(path: Path) -> None:
    """
    Raises:
        FolderError: it is a folder, a file of something else, or cannot be written.
    """
    check_file(path)
    if path.exists() and not _is_page(path):
        raise FolderError(f"{path}: exists and is no report of intrafusion; choose another name with -o.")


def _is_page(path: Path) -> bool:
    text = path.read_bytes()
    return not text or (text.lstrip()[:15].lower() == b"<!doctype html>" and b"intrafusion" in text)


def check_writable(path: Path) -> None:
    """Try to write beside the path, in the nearest folder that exists already; nothing stays.

    Raises:
        FolderError: there is no permission, no space, or it is no name of a file.
    """
    try:
        with report_unwritable(path):
            target = path.resolve()
            target.exists()
            place = target if target.is_dir() else next(p for p in target.parents if p.exists())
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"\0")
    except (ValueError, RuntimeError) as error:  # a null character; links that lead in a circle
        raise FolderError(f"{str(path)!r}: is no name of a file or folder ({error}); choose another one.") from error


def check_place(folder: Path, network: Network) -> None:
    """
    Raises:
        FolderError: it has no room for the network, or lies in the folder that this came from.
    """
    check_space(folder, network.model)
    if network.folder:
        check_apart(folder, network.folder)


def check_space(path: Path, model: nn.Module) -> None:
    """
    Raises:
        FolderError: the disk has no room for the weights of the network.
    """
    place = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    needed = sum(t.nbytes for t in named_tensors(model).values())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise FolderError(
            f"{path}: expected room for {needed / 1e6:,.0f} MB, got {free / 1e6:,.0f} MB free on this disk; "
            "free some space, or choose another place with -o."
        )
