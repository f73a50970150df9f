"""The network that a command works on: built from its name, with its weights and an example input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from intrafusion.cli.inputs import read_inputs
from intrafusion.cli.models import FORMS, resolve
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
    """

    name: str
    model: nn.Module
    inputs: Inputs
    imports: str
    original: str

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


def read_network(
    name: str,
    *,
    base: str | None = None,
    weights: Path | None = None,
    arguments: Sequence[str] = (),
    inputs: Sequence[str] = (),
    trained: bool = True,
) -> Network:
    """Build a network, or load a saved folder onto the network it was made from.

    Args:
        base: the original network of a saved folder.
        weights: file of weights to load.
        arguments: of the factory, as key=value.
        inputs: shapes; none for those that are known for the network.
        trained: whether a network of the zoo is wanted with its trained weights.
    Raises:
        ModelError: it cannot be built, or no example input is known.
        FolderError: its weights or the folder cannot be read.
    """
    saved = is_saved(name)
    if saved != (base is not None) or (saved and weights):
        raise ModelError(_misfit(name, saved=saved, weights=weights))
    spec = resolve(base or name, arguments, trained=trained and not (saved or weights))
    example = read_inputs(inputs) if inputs else spec.example_input()
    if example is None:
        raise ModelError(f"{name}: no example input is known for it; give its shape, such as --input 1,3,224,224.")
    model = spec.build()
    if weights is not None:
        load_into(model, read_state(weights))
    imports, original = spec.python()
    if saved:
        model, original = load(name, model), _loading(Path(name), original)
    return Network(name, model, Inputs.of(example), imports, original)


def _misfit(name: str, *, saved: bool, weights: Path | None) -> str:
    """Why a name and the options beside it do not go together."""
    if not saved:
        return f"{name}: --base goes with a saved folder, and there is no such folder; check the path, or leave it out."
    if weights:
        return f"{name}: a saved folder has weights of its own; leave out --weights."
    return f"{name}: a saved folder holds no code; name the original network with --base ({FORMS})."
