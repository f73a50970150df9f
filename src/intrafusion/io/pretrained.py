"""Folders in the format of Hugging Face: where their network lies, what lies beside it, and a smaller one in its place.

Folders of sentence-transformers too: modules.json names the part that holds the network, other parts are copied.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from intrafusion.documents import parse_json
from intrafusion.errors import FolderError, ModelError
from intrafusion.network.double import TOLERANCE, copy_as_double, output_difference, run_in_double
from intrafusion.network.inputs import Inputs
from intrafusion.surgery.configuration import take_rounded_

_CONFIG, _MODULES = "config.json", "modules.json"
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".index.json"),
    *(".py", ".tflite", ".npz", ".arrow"),
)
"""Ends of the names of what is not copied: weights, which would be the old ones, and code."""
_WHOLE = "1000000GB"  # one file, which `intrafusion.load` reads too


def find_network_part(folder: Path) -> str:
    """Where in a folder the network lies: "" or, as modules.json of sentence-transformers says, a folder in it.

    Raises:
        FolderError: modules.json is damaged, or names no network.
    """
    path = folder / _MODULES
    if not path.is_file():
        return ""
    parts = [part for kind, part in _read_modules(path) if kind.rpartition(".")[2] == "Transformer"]
    if len(parts) != 1:
        raise FolderError(f"{path}: expected one module of the type Transformer, got {len(parts)}; name its folder.")
    return parts[0]


def is_of_sentences(folder: Path) -> bool:
    """Whether sentence-transformers wrote it, with a network and other modules in it."""
    return (folder / _MODULES).is_file()


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """Type and folder of every module."""
    try:
        found = [(str(entry["type"]), str(entry["path"])) for entry in parse_json(path.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FolderError(
            f"{path}: expected modules with a type and a path ({error}); fetch the folder again."
        ) from error
    for _, part in found:
        if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts or "\\" in part or "\0" in part:
            raise FolderError(f"{path}: its module {part!r} lies outside the folder; refused.")
    return found


def check_apart(folder: Path, origin: Path) -> None:
    """
    Raises:
        FolderError: a folder is, or lies in, the one that is read.
    """
    if folder.resolve().is_relative_to(origin.resolve()):
        raise FolderError(f"{folder}: is or lies in the folder of the original, {origin}; choose another name.")


def write_pretrained(model: nn.Module, inputs: Inputs, origin: Path, folder: Path, ours: tuple[str, ...]) -> list[str]:
    """Write a network where its original lies in its folder, and copy what lies beside: tokenizer, pooling, licence.

    What is written is opened with `from_pretrained` and compared.

    Args:
        folder: an empty one.
        ours: names that are not copied.
    Returns:
        names of what was written.
    Raises:
        FolderError: the original folder cannot be read.
        ModelError: no configuration says the sizes of the network, or another network comes back.
    """
    network: Any = model
    part = find_network_part(origin)
    place = folder / part
    with without_bars():
        network.save_pretrained(place, max_shard_size=_WHOLE)
    copy_beside(origin / part, place, ours)
    if is_of_sentences(origin):
        copy_beside(origin, folder, ours)
        copy_modules(origin, folder)
        _mend_widths(folder, part, _read_width(origin / part), _read_width(place))
    _check_opens(network, place, inputs)
    return sorted(path.name for path in folder.iterdir())


def copy_beside(source: Path, target: Path, ours: tuple[str, ...] = ()) -> None:
    """Files that are no weights, and were not written anew."""
    for path in sorted(source.iterdir()):
        goal, wanted = target / path.name, path.name not in ours and not path.name.endswith(_WEIGHTS)
        if wanted and path.is_file() and not goal.exists():
            shutil.copyfile(path, goal)


def copy_modules(origin: Path, folder: Path) -> None:
    """The folders of the modules that stand behind a network of sentence-transformers; nothing of another folder."""
    if not is_of_sentences(origin):
        return
    part = find_network_part(origin)
    for _, other in _read_modules(origin / _MODULES):
        if other != part and (origin / other).is_dir():  # of a module without files none is kept
            shutil.copytree(origin / other, folder / other, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _read_width(folder: Path) -> Any:
    config = parse_json((folder / _CONFIG).read_bytes())
    return next((config[name] for name in ("hidden_size", "d_model", "dim", "n_embd") if name in config), None)


def _mend_widths(folder: Path, part: str, before: Any, after: Any) -> None:
    """The modules behind the network are told how wide its outputs are."""
    if before == after:
        return
    for _, other in _read_modules(folder / _MODULES):
        path = folder / other / _CONFIG
        if other == part or not path.is_file():
            continue
        config = parse_json(path.read_bytes())
        if config.get("in_features") == before:
            raise ModelError(
                f"{path.parent.name}: reads outputs that were {before} wide and are {after} now; leave the width of "
                "the network alone with exclude."
            )
        if config.get("word_embedding_dimension") == before:
            path.write_text(json.dumps({**config, "word_embedding_dimension": after}, indent=2))


def _check_opens(network: Any, place: Path, inputs: Inputs) -> None:
    """
    Raises:
        ModelError: `from_pretrained` opens another network than was written, or none.
    """
    try:
        with without_bars():
            found, told = type(network).from_pretrained(
                place, dtype="auto", local_files_only=True, output_loading_info=True
            )
        lost = [name for kind in ("missing_keys", "mismatched_keys") for name in told.get(kind, ())]
        found.to(next(network.parameters()).device).eval()
        take_rounded_(found, network)
        a, b = (run_in_double(copy_as_double(m), inputs) for m in (found, network))
        differ = output_difference(a, b) if len(a) == len(b) else float("inf")
    except Exception as error:  # whatever it makes of what it does not understand
        raise ModelError(
            f"{type(network).__name__}: from_pretrained does not open what save_pretrained wrote "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); save without `pretrained`."
        ) from error
    if lost or not differ <= TOLERANCE:
        why = f"without {lost[:3]}" if lost else f"with outputs that differ by {differ:.2g}"
        raise ModelError(
            f"{type(network).__name__}: from_pretrained opens what save_pretrained wrote {why}; save without "
            "`pretrained`, and load with intrafusion.load."
        )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars of transformers."""
    logging = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
