"""Networks of Hugging Face transformers: what `hf:` names, built from a local folder or the cache, and example inputs.

No code out of a folder is run: the architecture is one of the installed package.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError, unknown_name
from intrafusion.network.sources import import_torchvision, needing

_TOKENS, _SAMPLES = 16, 16_000


def split_target(target: str) -> tuple[str, str | None]:
    """Name or folder, and the architecture behind a colon, if there is one.

    >>> split_target("models/bert:BertForMaskedLM"), split_target("gpt2")
    (('models/bert', 'BertForMaskedLM'), ('gpt2', None))
    """
    name, _, architecture = target.rpartition(":")
    return (name, architecture) if name else (target, None)


def build_from_folder(target: str, *, trained: bool, args: Mapping[str, Any]) -> nn.Module:
    """The network in evaluation mode, as its configuration says; with random weights unless `trained`.

    Args:
        args: change the configuration.
    Raises:
        ModelError: there is no such folder or model, it is damaged, or it names no architecture that is installed.
    """
    name, _ = split_target(target)
    config, architecture = _find_architecture(target, args)
    try:
        if not trained:
            return architecture(config).eval()
        return architecture.from_pretrained(name, config=config, trust_remote_code=False).eval()
    except Exception as error:  # whatever damaged weights and odd configurations make it raise
        raise ModelError(
            f"hf:{target}: {architecture.__name__} cannot be built ({_first_line(error)}); "
            "check the folder, or name another architecture as hf:FOLDER:ARCHITECTURE."
        ) from error


def python_expression(target: str, args: Mapping[str, Any]) -> str:
    """What builds the same network in Python, where `transformers` is imported."""
    name, _ = split_target(target)
    _, architecture = _find_architecture(target, args)
    options = "".join(f", {key}={value!r}" for key, value in args.items())
    return f"transformers.{architecture.__name__}.from_pretrained({name!r}{options})"


def example_from_config(target: str, args: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Token numbers, masks, pixels or sound of the sizes that the configuration names; None where it names none."""
    config, architecture = _find_architecture(target, args)
    taken = inspect.signature(architecture.forward).parameters
    found = {name: tensor for name, make in _MAKERS.items() if name in taken and (tensor := make(config)) is not None}
    if "input_ids" in found and "attention_mask" in taken:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    if not getattr(config, "is_encoder_decoder", False):
        found.pop("decoder_input_ids", None)
    return found or None


def _find_architecture(target: str, args: Mapping[str, Any]) -> tuple[Any, Any]:
    """Configuration and class.

    Raises:
        ModelError: there is none.
    """
    name, wanted = split_target(target)
    transformers = _import_transformers()
    config = _read_config(transformers, target, name, args)
    named = wanted or next(iter(getattr(config, "architectures", None) or ()), None)
    if named is None:
        raise ModelError(f"hf:{target}: config.json names no architecture; name one as hf:{name}:ARCHITECTURE.")
    if not hasattr(transformers, named) or not hasattr(getattr(transformers, named), "from_pretrained"):
        known = [n for n in dir(transformers) if n.startswith(("Auto", type(config).__name__.removesuffix("Config")))]
        raise ModelError(f"hf:{target}: {unknown_name('architecture', named, known)}")
    found = getattr(transformers, named)
    return config, _resolve_auto(target, config, found) if named.startswith("Auto") else found


def _import_transformers() -> Any:
    with needing("transformers"):
        transformers = importlib.import_module("transformers")
    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # which transformers takes for its image networks
    return transformers


def _read_config(transformers: Any, target: str, name: str, args: Mapping[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **args)
    except Exception as error:  # no promise of narrower ones
        near = "" if Path(name).exists() else _nearest_folder(name)
        raise ModelError(
            f"hf:{target}: expected a folder with a config.json, or the name of a model in the cache or on the hub, "
            f"got {type(error).__name__}: {_first_line(error)}{near}"
        ) from error


def _resolve_auto(target: str, config: Any, auto: Any) -> Any:
    """The class that an AutoModel... stands for."""
    try:
        found = auto._model_mapping[type(config)]
    except (KeyError, AttributeError) as error:
        raise ModelError(
            f"hf:{target}: {type(config).__name__} has no {auto.__name__}; leave it out, or name another head."
        ) from error
    return found[0] if isinstance(found, (list, tuple)) else found


def _nearest_folder(name: str) -> str:
    parent = Path(name).parent
    there = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(name, there, n=1)
    return f" Did you mean 'hf:{near[0]}'?" if near else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---- example inputs -------------------------------------------------------------------------------------------------


def _read_field(config: Any, *names: str) -> Any:
    """The first of these fields that the configuration, or one that lies in it, has."""
    inner = [getattr(config, part, None) for part in ("vision_config", "text_config", "encoder", "audio_config")]
    for place in (config, *inner):
        for name in names:
            if (found := getattr(place, name, None)) is not None:
                return found
    return None


def _make_tokens(config: Any) -> Tensor | None:
    vocabulary = _read_field(config, "vocab_size")
    if not isinstance(vocabulary, int):
        return None
    longest = _read_field(config, "max_position_embeddings", "n_positions")
    count = min(_TOKENS, longest) if isinstance(longest, int) and longest > 0 else _TOKENS
    padding = getattr(config, "pad_token_id", None)
    others = [number for number in range(min(vocabulary, 3 * count)) if number != padding] or [0]
    return torch.tensor([[others[(7 * place + 1) % len(others)] for place in range(count)]])


def _make_pixels(config: Any) -> Tensor | None:
    size = _read_field(config, "image_size")
    if size is None:
        size = 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _read_field(config, "num_channels")
    return _draw((1, channels if isinstance(channels, int) else 3, height, width))


def _make_features(config: Any) -> Tensor | None:
    bins, places = _read_field(config, "num_mel_bins"), _read_field(config, "max_source_positions")
    return _draw((1, bins, 2 * places)) if isinstance(bins, int) and isinstance(places, int) else None


def _draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_MAKERS = {
    "input_ids": _make_tokens,
    "pixel_values": _make_pixels,
    "input_values": lambda config: _draw((1, _SAMPLES)),
    "input_features": _make_features,
    "decoder_input_ids": _make_tokens,
}
