"""Read the weights of a network from a file without ever running code from it, and put them into a network."""

from __future__ import annotations

import difflib
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import FolderError
from intrafusion.io.atomic import report_unreadable

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")

_REMEDY = (
    "Open it once where you trust it, and save the weights alone: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
)
_SHOWN = 5
_DEPTH = 10


@checked
def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU.

    Reads `.safetensors`, and `.pth`, `.pt`, `.bin`, `.ckpt` as far as they hold nothing but tensors and plain values.
    The state dict may lie inside a checkpoint under "state_dict", "model_state_dict" or "model"; a prefix "module." or
    "_orig_mod." that every name carries, as data parallelism and `torch.compile` leave it, is dropped.

    Raises:
        FolderError: there is no such file, it is damaged, it would have to run code to be read, or it holds no tensors.
    """
    path = Path(path)
    with report_unreadable(path):
        return _without_prefix(_tensors(path, _read(path)))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FolderError(f"{path}: there is no such file; expected a weight file (.safetensors or .pth).")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in _TORCH_SUFFIXES:
        return read_torch_file(path)
    raise FolderError(
        f"{path}: cannot tell from the suffix {path.suffix!r} what the file holds; "
        f"expected .safetensors, {', '.join(_TORCH_SUFFIXES)}."
    )


@checked
def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy every tensor of `state` into the network, which must have exactly these names and shapes.

    Of tied tensors one is enough, and a batch norm may lack its count of batches. A network that does not fit is left
    untouched.

    Raises:
        ArgumentError: tensors without values of their own, or sparse ones.
        FolderError: names are missing or unexpected, shapes differ, tensors are of a kind of which a part would be
            lost, or tensors that the network ties differ; lists them with the nearest names.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)  # with the parameters themselves, to see which are tied
    for name, tensor in state.items():
        if name in own:
            _check_kind(name, tensor, own[name])
    differences = list(_differences(own, state))
    if differences:
        raise FolderError(
            f"the weights do not fit {type(model).__name__}: {'; '.join(differences)}. "
            "Build the network that these weights were saved from, or rename them."
        )
    model.load_state_dict(dict(state), strict=False)


def _check_kind(name: str, saved: Tensor, own: Tensor) -> None:
    """Raise FolderError for numbers that the network's tensor could not hold: of them a part would be lost."""
    if saved.is_complex() > own.is_complex():
        kept = "its imaginary part would be lost; save the real part, or build the complex network"
    elif _is_inexact(saved) > _is_inexact(own):
        whole = torch.equal(saved.to(own.dtype).to(saved.dtype), saved)
        kept = "" if whole else "what is behind the point would be lost; save whole numbers"
    elif isinstance(own, nn.Parameter) and _is_inexact(own) > _is_inexact(saved):
        kept = "these look like quantized weights, whose scale would be lost; save them dequantized"
    else:
        exact = _is_inexact(saved) or torch.equal(saved.to(own.dtype).to(saved.dtype), saved)
        kept = "" if exact else "numbers would be lost that do not fit; save them in that type"
    if kept:
        raise FolderError(f"{name}: expected {own.dtype}, got {saved.dtype}: {kept}.")


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise FolderError(f"{path}: not a safetensors file, or a damaged one ({error}); fetch it again.") from error


def read_torch_file(path: Path, remedy: str = _REMEDY) -> Any:
    """What `torch.save` wrote, as far as that is tensors and plain values.

    Args:
        remedy: what to do where it is more.
    Raises:
        FolderError: reading it would run code, or it is damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FolderError(f"{path}: refused, {_refusal(str(error))}. {remedy}") from error
    except Exception as error:  # torch.load passes on whatever a damaged file makes its readers raise
        if "TorchScript" in str(error):
            raise FolderError(f"{path}: refused, it is a TorchScript program. {remedy}") from error
        raise FolderError(
            f"{path}: not a PyTorch file, or a damaged one ({_first_line(error)}); fetch it again."
        ) from error


def _refusal(message: str) -> str:
    found = re.search(r"unsupported global:? (?:GLOBAL )?([\w.]+)", message, flags=re.IGNORECASE)
    if found:
        return f"reading it would run code: it needs {found[1]}"
    return "reading it would run code: it is a pickle of more than tensors and plain values"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")


def _tensors(path: Path, content: Any, depth: int = 0) -> dict[str, Tensor]:
    """The state dict itself, out of the checkpoint it may lie in; one that lies in itself holds none."""
    if isinstance(content, Mapping) and depth < _DEPTH:
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _tensors(path, content[key], depth + 1)
    raise FolderError(
        f"{path}: expected named tensors, or such under {', '.join(map(repr, _WRAPPERS))}; "
        f"got {_describe(content)}. Save model.state_dict() alone."
    )


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if not content:
        return "nothing"
    kinds = [f"{name!r}: {type(value).__name__}" for name, value in content.items() if not isinstance(value, Tensor)]
    return _listing(kinds)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefix({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    shared = [name for name in own if name in state]
    given = {id(own[name]) for name in shared}
    missing = [name for name in own if id(own[name]) not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in shared
        if own[name].shape != state[name].shape
    ]
    if missing:
        yield f"{len(missing)} missing ({_listing(missing, near=unexpected)})"
    if unexpected:
        yield f"{len(unexpected)} unexpected ({_listing(unexpected)})"
    if reshaped:
        yield f"{len(reshaped)} of another shape ({_listing(reshaped)})"
    first: dict[int, str] = {}
    for name in shared:
        leader = first.setdefault(id(own[name]), name)
        if leader != name and not torch.equal(state[leader], state[name]):
            yield f"{leader} and {name} are one tensor in the network but differ in the weights"


def _listing(names: list[str], near: list[str] | None = None) -> str:
    """The first few names, each with the nearest of `near`."""
    shown = []
    for name in names[:_SHOWN]:
        match = difflib.get_close_matches(name, near or [], n=1)
        shown.append(f"{name}, nearest {match[0]}" if match else name)
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")
