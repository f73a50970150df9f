"""The network that a command works on: built from its name, with its weights and an example input."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from intrafusion.cli import hugging_face
from intrafusion.cli.console import messages
from intrafusion.cli.inputs import read_inputs
from intrafusion.cli.models import FILE_PREFIX, FORMS, ModelSpec, NetworkKind, resolve
from intrafusion.cli.show import say
from intrafusion.compressed import Compressed
from intrafusion.errors import FolderError, ModelError
from intrafusion.io.folder import is_ours, load, read_document
from intrafusion.io.line import write_line
from intrafusion.io.pretrained import find_network_part
from intrafusion.io.program import Program
from intrafusion.io.weights import load_into, read_state
from intrafusion.network.inputs import Inputs

_C = TypeVar("_C", bound=Compressed)


@dataclass(frozen=True)
class Network:
    """A network ready to run.

    Attributes:
        name: what the command line called it.
        inputs: of one forward call.
        imports: import statements, and
        original: the expression behind them that builds it again in Python.
        doubt: why its weights are not trained ones, if that is known.
        folder: in the format of Hugging Face, that it was read from.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    imports: str
    original: str
    doubt: str | None = None
    folder: Path | None = None

    def on(self, device: torch.device) -> Network:
        """The same network on a device."""
        return replace(self, model=self.model.to(device), inputs=self.inputs.map(lambda t: t.to(device)))

    def loading(self, folder: Path) -> str:
        """One line of Python that loads what `compress` saved from this network."""
        return loading_line(folder, self.imports, self.original)


def tell_doubt(*networks: Network) -> None:
    """Say before the work which networks have random weights."""
    for doubt in dict.fromkeys(network.doubt for network in networks if network.doubt):
        messages.print(f"warning: {doubt}", soft_wrap=True)


def annotated(found: _C, *networks: Network) -> _C:
    """The result, with a note of networks that have random weights, and the original named as in the user's file."""
    notes = (*found.notes, *dict.fromkeys(n.doubt for n in networks if n.doubt))
    original = found.original and replace(found.original, name=found.original.name.removeprefix(FILE_PREFIX))
    return replace(found, notes=notes, original=original)


def lift_precision_(network: Network) -> dict[str, torch.dtype]:
    """A network of half precision out of a folder in single, in which it is solved (in place); what its tensors were.

    `hugging_face.lower_precision_` gives results the precision that the network came in.
    """
    return hugging_face.lift_precision_(network.model) if network.folder else {}


def say_saved(network: Network, folder: Path | None) -> None:
    """Where the result is, and the lines of Python that load it."""
    if folder is None:
        say("\nnothing was written; -o FOLDER saves it")
        return
    say(f"\nsaved to {folder}; back in one line:\n{network.loading(folder)}")
    if read_document(folder).get("program"):
        say(f"or without the code of the network:\n{write_line(folder, trust=True)}")
    for line in list_opening(folder):
        say(line)


def list_opening(folder: Path) -> list[str]:
    """The line that opens a folder without intrafusion, if there is one."""
    kind, part = read_document(folder).get("pretrained"), find_network_part(folder)
    place = str((folder / part).resolve())
    return [f"or: import transformers; model = transformers.{kind}.from_pretrained({place!r})"] if kind else []


def loading_line(folder: Path, imports: str, original: str) -> str:
    """The line for a folder that was just written; one that says what it was made from needs no more."""
    names_itself = bool(read_document(folder).get("source"))
    return write_line(folder) if names_itself else write_line(folder, imports, original)


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
    trust_program: bool = False,
) -> Network:
    """Build a network, or load a saved folder: alone, or onto the network it was made from.

    What is cheap to find out is looked at first: names, files, inputs; then the network is built.

    Args:
        base: the original network of a saved folder that needs it.
        weights: file of weights to load, one at most.
        arguments: of the factory, as key=value.
        inputs: shapes; none for those that are known for the network.
        device: where it runs.
        trained: whether a network of the zoo is wanted with its trained weights; of others, whether they are is told.
        trust_program: whether the program in a saved folder may be loaded, which can run code.
    Raises:
        ModelError: it cannot be built, or no example input is known.
        FolderError: its weights or the folder cannot be read.
    """
    place = read_device(device)
    if len(weights) > 1:
        raise ModelError(f"--weights: expected one file for one network, got {len(weights)}; leave out the others.")
    saved = is_saved(name)
    if (base is not None and not saved) or (saved and weights):
        raise ModelError(_misfit(name, base, weights=weights))
    if saved and base is None:
        if arguments:
            raise ModelError(f"{name}: --arg is for the network that --base names; name it, or leave out --arg.")
        return _read_folder(Path(name), inputs, trust_program=trust_program).on(place)
    spec = resolve(base or name, arguments, trained=trained and not (saved or weights))
    spec.check()
    example = _find_example(name, inputs, spec, Path(name) if saved else None)
    states = [read_state(file) for file in weights]
    model = (
        spec.build().eval()
    )  # no command trains what it is given, and what is saved is loaded in the mode that it had
    for state in states:
        load_into(model, state)
    imports, original = spec.python()
    if saved:
        return Network(name, load(name, model), example, imports, _write_loading(Path(name), original)).on(place)
    doubt = spec.doubt_weights(model) if trained and not weights else None
    folder = hugging_face.find_folder(spec.target) if spec.kind is NetworkKind.HF else None
    return Network(name, model, example, imports, original, doubt, folder).on(place)


def _find_example(name: str, inputs: Sequence[str], spec: ModelSpec | None, folder: Path | None = None) -> Inputs:
    """One call: of the shapes given, else of those that are known for the network, else of those in the folder.

    Raises:
        ModelError: there are none.
    """
    example = read_inputs(inputs) if inputs else spec.example_input() if spec is not None else None
    if example is None and folder is not None:
        example = _read_recorded(folder)
    if example is None:
        raise ModelError(f"{name}: no example input is known for it; give its shape, such as --input 1,3,224,224.")
    return Inputs.of(example)


def _read_recorded(folder: Path) -> Inputs | None:
    """The example inputs that a folder records by their shapes.

    Raises:
        FolderError: what it records are no shapes.
    """
    shapes = read_document(folder).get("inputs")
    if shapes is None:  # of before they were recorded, or no tensors
        return None
    if not isinstance(shapes, list) or not all(isinstance(shape, str) for shape in shapes):
        raise FolderError(f"{folder}: damaged, its inputs are no shapes; give them with --input.")
    return read_inputs(shapes)


def _read_folder(folder: Path, inputs: Sequence[str], *, trust_program: bool) -> Network:
    """A folder that is loaded without its original: it names it, or its program may be loaded.

    Raises:
        ModelError: neither; says how.
    """
    data = read_document(folder)
    known = data.get("source") or (trust_program and data.get("program"))
    if not known:
        raise ModelError(f"{folder}: holds weights, not the code of its network. {_tell_ways(data)}")
    example = _find_example(str(folder), inputs, None, folder)
    try:
        model = load(folder, trust_program=trust_program)
    except ModelError as error:
        raise ModelError(f"{error} Here: {_tell_ways(data)}") from error
    trust = ", trust_program=True" if isinstance(model, Program) else ""
    return Network(str(folder), model, example, "", f"intrafusion.load({os.path.abspath(folder)!r}{trust})")


def _tell_ways(data: Mapping[str, Any]) -> str:
    """How a folder can be read that cannot be read alone."""
    name = (data.get("original") or {}).get("name")
    of = f", {name}," if isinstance(name, str) else ""
    ways = f"Name the original network{of} with --base ({FORMS})"
    if not data.get("program"):
        return f"{ways}."
    return f"{ways}; or, if you trust who wrote the folder, load its program, which can run code, with --trust-program."


def _write_loading(folder: Path, original: str) -> str:
    return f"intrafusion.load({str(folder.resolve())!r}, {original})"


def _misfit(name: str, base: str | None, *, weights: Sequence[Path]) -> str:
    """Why a name and the options beside it do not go together."""
    if weights and is_saved(name):
        return f"{name}: a saved folder has weights of its own; leave out --weights."
    return f"{name}: --base {base} goes with a saved folder, and this is none; check the path, or leave it out."
