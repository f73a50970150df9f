"""Networks of Hugging Face transformers: what `hf:` names, built from a local folder or the cache, their tokenizers and
example inputs.

No code out of a folder is run unless the user says so (`--arg trust_remote_code=true`): the architecture is one of the
installed package.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.compressed import Compressed
from intrafusion.errors import FolderError, ModelError, unknown_name
from intrafusion.io.pretrained import find_network_part, without_bars
from intrafusion.io.shards import FLOATS, Shards
from intrafusion.names import hide_numbers, name_some
from intrafusion.network.calibration_images import warn_of
from intrafusion.network.double import output_difference
from intrafusion.network.sources import import_torchvision, needing
from intrafusion.network.tensors import named_tensors
from intrafusion.network.texts import Tokenizer

_TOKENS, _SAMPLES = 16, 16_000
_TRUST = "trust_remote_code"
_HEAVY = ["*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf"]


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
        args: change the configuration; `trust_remote_code=True` runs the code that the folder brings.
    Raises:
        ModelError: there is no such folder or model, it is damaged, its weights are quantised or others than its
            configuration says, or it names no architecture that is installed.
    """
    name, trust = _place_of(target), bool(args.get(_TRUST, False))
    config, architecture = _find_architecture(target, args)
    try:
        if not trained:
            return architecture(config).eval()
        with without_bars():
            found, told = architecture.from_pretrained(
                name, config=config, dtype="auto", trust_remote_code=trust, output_loading_info=True
            )
    except Exception as error:  # whatever damaged weights and odd configurations make it raise
        if "ignore_mismatched_sizes" in str(error):  # an option of transformers, which nobody here has set
            raise ModelError(
                f"hf:{target}: config.json and the weights contradict each other: there are weights of other shapes, "
                "which the report of transformers names; fetch the folder again."
            ) from error
        raise ModelError(
            f"hf:{target}: {architecture.__name__} cannot be built ({_first_line(error)}); "
            "check the folder, or name another architecture as hf:FOLDER:ARCHITECTURE."
        ) from error
    _check_complete(target, found, told)
    _check_floats(target, Path(name), found)
    return found.eval()


def python_expression(target: str, args: Mapping[str, Any]) -> str:
    """What builds the same network in Python, where `transformers` is imported."""
    name, (_, architecture) = _place_of(target), _find_architecture(target, args)
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
    config = _read_config(transformers, target, _place_of(target), args)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"hf:{target}: its weights are quantised, which cannot be solved anew; name the folder that they were "
            "quantised from, and quantise the smaller network."
        )
    if args.get(_TRUST, False) and (brought := _find_brought(transformers, config, name)) is not None:
        return config, brought
    named = wanted or next(iter(getattr(config, "architectures", None) or ()), None)
    if named is None:
        raise ModelError(f"hf:{target}: config.json names no architecture; name one as hf:{name}:ARCHITECTURE.")
    if not hasattr(transformers, named) or not hasattr(getattr(transformers, named), "from_pretrained"):
        if getattr(config, "auto_map", None):
            raise ModelError(
                f"hf:{target}: {named} is code that the folder brings, which is not run; if you trust who wrote it, "
                f"add --arg {_TRUST}=true."
            )
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
        return transformers.AutoConfig.from_pretrained(name, **{_TRUST: False, **args})
    except Exception as error:  # no promise of narrower ones
        near = "" if Path(name).exists() else _nearest_folder(name)
        raise ModelError(
            f"hf:{target}: expected a folder with a config.json, or the name of a model in the cache or on the hub, "
            f"got {type(error).__name__}: {_first_line(error)}{near}"
        ) from error


def _find_brought(transformers: Any, config: Any, name: str) -> Any:
    """The class of the network that a folder brings the code of, ready to be saved with it; None if it brings none."""
    brought = {k: v for k, v in (getattr(config, "auto_map", None) or {}).items() if k.startswith("AutoModel")}
    for auto, reference in brought.items():
        load = importlib.import_module("transformers.dynamic_module_utils").get_class_from_dynamic_module
        found = load(reference if isinstance(reference, str) else reference[0], name)
        if len(brought) == 1 or found.__name__ in (getattr(config, "architectures", None) or ()):
            found.register_for_auto_class(auto)
            type(config).register_for_auto_class()
            return found
    return None


def _check_floats(target: str, folder: Path, model: nn.Module) -> None:
    """
    Raises:
        ModelError: weights of the folder are of another kind than half, single or double precision, which a
            configuration that says nothing of it makes numbers of.
    """
    if not folder.is_dir():
        return
    try:
        stored = Shards.of(folder).tensors
    except FolderError:  # weights in another format
        return
    own = {name for name, t in named_tensors(model).items() if t.is_floating_point()}
    odd = [name for name, s in stored.items() if s.dtype not in FLOATS and any(n.endswith(name) for n in own)]
    if odd:
        raise ModelError(f"hf:{target}: {name_some(odd)} are quantised; compress those they were quantised from.")


def _check_complete(target: str, model: nn.Module, told: Mapping[str, Any]) -> None:
    """
    Raises:
        ModelError: the configuration says more layers than there are weights, or fewer.
    Warns:
        IntrafusionWarning: a part of the network is not in the folder, and has random weights.
    """
    missing, extra = sorted(told.get("missing_keys", ())), sorted(told.get("unexpected_keys", ()))
    there = {name for name in model.state_dict() if name not in missing}
    lost, left = _find_alike(missing, there), _find_alike(extra, there)
    if lost or left:
        what = (
            f"no weights of {name_some(lost)}" if lost else f"weights of {name_some(left)}, which it has no place for"
        )
        raise ModelError(
            f"hf:{target}: config.json and the weights contradict each other: there are {what}; fetch the folder again."
        )
    if missing:
        warn_of({"missing": f"hf:{target} has no weights of {name_some(missing)}: these are random."})


def _find_alike(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names that are those of others but for the number of the layer."""
    kinds = {hide_numbers(name) for name in others}
    return [name for name in names if hide_numbers(name) in kinds and hide_numbers(name) != name]


def _place_of(target: str) -> str:
    """The folder that holds the network: of sentence-transformers, a part of what was named."""
    name, _ = split_target(target)
    return str(Path(name) / find_network_part(Path(name))) if Path(name).is_dir() else name


def find_folder(target: str) -> Path:
    """The folder that was named; of a model on the hub, its folder in the cache.

    Raises:
        ModelError: it is not there.
    """
    name, _ = split_target(target)
    if Path(name).is_dir():
        return Path(name)
    fetch = importlib.import_module("huggingface_hub").snapshot_download
    try:
        return Path(fetch(name, ignore_patterns=_HEAVY))
    except Exception as error:  # no network, no such model
        raise ModelError(f"hf:{target}: cannot be fetched ({_first_line(error)}); name a folder.") from error


# ---- tokenizers -----------------------------------------------------------------------------------------------------

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder. One without a token for padding pads with the last token of texts; masks leave it out.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    place = folder / find_network_part(folder) if folder.is_dir() else folder
    if not any(path for pattern in _TOKENIZERS for path in place.glob(pattern)):
        raise ModelError(
            f"--texts: expected a tokenizer beside the network, got none in {folder}; name the network as hf:FOLDER "
            f"with a {_TOKENIZERS[0]} in it, or tokenize in Python and pass inputs=."
        )
    try:
        found = _import_transformers().AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # whatever damaged folders make it raise
        raise ModelError(
            f"--texts: the tokenizer in {folder} cannot be read ({_first_line(error)}); fetch the folder again."
        ) from error
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def find_tokenizer(folder: Path, model: nn.Module) -> Tokenizer | None:
    """The same for sentences that are made without data; None where there is none whose tokens the network knows."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a class of the user's own need not say
        return None
    if not folder.is_dir() or not isinstance(embedding, nn.Embedding):
        return None
    try:
        found = read_tokenizer(folder)
    except ModelError:
        return None
    known: dict[str, int] = getattr(found, "get_vocab", dict)()
    return found if known and max(known.values()) < embedding.num_embeddings else None


# ---- half precision -------------------------------------------------------------------------------------------------


def lift_precision_(model: nn.Module) -> dict[str, torch.dtype]:
    """A network of half precision in single precision, in which it is solved (in place), and what its tensors were."""
    dtypes = {name: t.dtype for name, t in named_tensors(model).items() if t.dtype in (torch.float16, torch.bfloat16)}
    if dtypes:
        model.float()
    return dtypes


def lower_precision_(small: Compressed, dtypes: Mapping[str, torch.dtype]) -> Compressed:
    """The smaller network with the precision that the original came in, which is said."""
    if not dtypes:
        return small
    before = small.inputs.call(small.model)
    for name, tensor in named_tensors(small.model).items():
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    after = small.inputs.map(lambda t: t.to(next(iter(dtypes.values()))) if t.is_floating_point() else t)
    small = replace(small, inputs=after)
    lost = output_difference([t.float() for t in after.call(small.model)], [t.float() for t in before])
    kind = str(next(iter(dtypes.values()))).removeprefix("torch.")
    note = f"solved in float32 and written in {kind}, as it came: rounding changes outputs by {lost:.2g} of the largest"
    return replace(small, notes=(*small.notes, note))


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
