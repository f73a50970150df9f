"""The network that a command works on: built from its name, with its weights and an example input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.cli import hugging_face
from intrafusion.cli.inputs import read_inputs
from intrafusion.cli.models import FORMS, NetworkKind, resolve
from intrafusion.errors import FolderError, ModelError
from intrafusion.io.folder import is_ours, load, read_document
from intrafusion.io.line import write_line
from intrafusion.io.weights import load_into, read_state
from intrafusion.network.inputs import Inputs


@dataclass(frozen=True)
class Network:
    """A network ready to run.

    Attributes:
        name: what the command line called it.
        inputs: of one forward call.
        imports: import statements, and
        original: the expression behind them that builds it again in Python.
        folder: in the format of Hugging Face, that it was read from.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    imports: str
    original: str
    folder: Path | None = None

    def loading(self, folder: Path) -> str:
        """One line of Python that loads what `compress` saved from this network."""
        return loading_line(folder, self.imports, self.original)


def loading_line(folder: Path, imports: str, original: str) -> str:
    """The line for a folder that was just written; one that says what it was made from needs no more."""
    names_itself = bool(read_document(folder).get("source"))
    return write_line(folder) if names_itself else write_line(folder, imports, original)


def _loading(folder: Path, original: str) -> str:
    return f"intrafusion.load({str(folder.resolve())!r}, {original})"


def is_saved(name: str) -> bool:
    """Whether this is a saved folder, not the name of a network.

    Raises:
        FolderError: it is some other folder.
    """
    folder = Path(name)
    if folder.is_dir() and not is_ours(folder):
        raise FolderError(f"{name}: this folder was not saved by intrafusion; expected {FORMS}, or a saved folder.")
    return folder.is_dir()


def read_device(text: str) -> torch.device:
    """
    Raises:
        ModelError: no device of PyTorch, or one that this machine does not have.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
        if device.type in ("meta", "mps"):  # the one has no values, the other no float64, in which maps are proved
            raise ModelError(f"--device {text!r}: expected a device of this machine with values and float64, or auto.")
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        count = torch.cuda.device_count()
        there = f"cpu, {', '.join(f'cuda:{index}' for index in range(count))}" if count else "cpu alone"
        raise ModelError(
            f"--device {text!r}: expected a device of this machine ({there}), or auto; PyTorch says: {why}."
        ) from error
    return device


def read_networks(
    names: Sequence[str], *, weights: Sequence[Path], base: str | None = None, **options: Any
) -> list[Network]:
    """Several networks, or one with several files of weights; options as of `read_network`.

    Raises:
        ModelError: there are files of weights, but neither one for each network nor only one network.
    """
    if weights and len(names) not in (1, len(weights)):
        raise ModelError(
            f"--weights: expected a file for each of {len(names)} networks, or one network and all its files, "
            f"got {len(weights)}."
        )
    if len(weights) > 1 and len(names) == 1:
        names = [*names] * len(weights)
    files = weights or [None] * len(names)
    bases = [base if Path(name).is_dir() else None for name in names]
    if base is not None and not any(bases):
        bases = [base] * len(names)
    chosen = zip(names, files, bases, strict=True)
    return [read_network(name, weights=[f] if f else [], base=own, **options) for name, f, own in chosen]


def read_network(
    name: str,
    *,
    base: str | None = None,
    weights: Sequence[Path] = (),
    arguments: Sequence[str] = (),
    inputs: Sequence[str] = (),
    device: str = "cpu",
    trained: bool = True,
) -> Network:
    """Build a network, or load a saved folder onto the network it was made from.

    Args:
        base: the original network of a saved folder.
        weights: file of weights to load, one at most.
        arguments: of the factory, as key=value.
        inputs: shapes; none for those that are known for the network.
        device: where it runs.
        trained: whether a network of the zoo is wanted with its trained weights.
    Raises:
        ModelError: it cannot be built, or no example input is known.
        FolderError: its weights or the folder cannot be read.
    """
    place = read_device(device)
    if len(weights) > 1:
        raise ModelError(f"--weights: expected one file for one network, got {len(weights)}; leave out the others.")
    saved = is_saved(name)
    if saved != (base is not None) or (saved and weights):
        raise ModelError(_misfit(name, base, saved=saved, weights=weights))
    spec = resolve(base or name, arguments, trained=trained and not (saved or weights))
    example = read_inputs(inputs) if inputs else spec.example_input()
    if example is None:
        raise ModelError(f"{name}: no example input is known for it; give its shape, such as --input 1,3,224,224.")
    model = spec.build()
    for file in weights:
        load_into(model, read_state(file))
    imports, original = spec.python()
    if saved:
        model, original = load(name, model), _loading(Path(name), original)
    folder = hugging_face.find_folder(spec.target) if spec.kind is NetworkKind.HF and not saved else None
    return Network(name, model.to(place), Inputs.of(example).map(lambda t: t.to(place)), imports, original, folder)


def _misfit(name: str, base: str | None, *, saved: bool, weights: Sequence[Path]) -> str:
    """Why a name and the options beside it do not go together."""
    if not saved:
        return f"{name}: --base {base} goes with a saved folder, and this is none; check the path, or leave it out."
    if weights:
        return f"{name}: a saved folder has weights of its own; leave out --weights."
    return f"{name}: a saved folder holds no code; name the original network with --base ({FORMS})."
