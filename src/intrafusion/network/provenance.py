"""The source of a network that names itself: its name in a package, and plain arguments, safe to read from a file."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from intrafusion.errors import IntrafusionError, ModelError
from intrafusion.network.apart import forked_random_numbers
from intrafusion.network.sources import SourceKind, find_timm, find_torchvision, find_transformers, find_zoo

_MARK, _CONFIGS = "_intrafusion_source", "_intrafusion_configs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}")
_TEXT = re.compile(r"[^/\\\0\n]{0,200}")  # no path, and no name of a repository on a hub
_LARGEST = 2**31
_MOST = 100_000  # values in a configuration
_COUNTED, _MOST_LAYERS = re.compile(r"layer|depth|block|stage|level|expert|branch"), 10_000  # lists are made of so many

_ARGUMENTS = frozenset(
    {
        *("num_classes", "in_chans", "img_size", "patch_size", "global_pool", "output_stride", "width_mult"),
        *("embed_dim", "depth", "num_heads", "groups", "width_per_group", "growth_rate", "aux_logits", "init_weights"),
        *("drop_rate", "drop_path_rate", "dropout", "stochastic_depth_prob", "transform_input"),
    }
)
"""Of factories: what shapes a network. Others fetch weights, or name files and classes."""

_LABELS = ("id2label", "label2id")
_DROPPED = ("_name_or_path", "transformers_version", "architectures", "auto_map")
_REFUSED = re.compile(
    r"auto_map|trust_remote_code|quantization_config|backbone|use_pretrained_backbone|use_timm_backbone|"
    r"_?name_or_path|custom_pipelines|_?use_(hub_)?kernels?|_?(attn|experts)_implementation.*"
)
"""Of configurations: what fetches, or runs code of others. Empty ones do nothing."""


@dataclass(frozen=True)
class Source:
    """A network that its package builds by name, with random weights: plain data, safe to read from a file.

    Attributes:
        name: of the network in its package; of transformers, the name of the class.
        args: keyword arguments of the factory; of transformers, the configuration.
    """

    kind: SourceKind
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    def build(self) -> nn.Module:
        """The network, in evaluation mode. Nothing is fetched, and the random numbers of the program are left alone.

        Raises:
            ModelError: the package is not installed, has no such network, or does not take the arguments.
        """
        check_source(self)
        with forked_random_numbers():
            try:
                return _BUILDERS[self.kind](self).eval()
            except IntrafusionError:
                raise
            except Exception as error:  # whatever odd arguments and configurations make it raise
                raise ModelError(
                    f"{self}: cannot be built here ({type(error).__name__}: {error}); give the network, or install the "
                    "version of its package that it was saved with."
                ) from error


def set_source_(model: nn.Module, kind: str, name: str, args: Mapping[str, Any]) -> nn.Module:
    """Have a network remember by which name it was built; copies do too."""
    shaping = {key: value for key, value in args.items() if key in _ARGUMENTS}
    vars(model)[_MARK] = Source(SourceKind(kind), name, shaping)
    return model


def get_source(model: nn.Module) -> Source | None:
    """What `set_source_` wrote."""
    return vars(model).get(_MARK)


def check_source(source: Source) -> None:
    """
    Raises:
        ModelError: a name or an argument that needs no such network, and could fetch something or run code.
    """
    if not _NAME.fullmatch(source.name):
        raise ModelError(f"{source.kind}: expected the name of a network, got {source.name[:100]!r}.")
    if source.kind is SourceKind.HF:
        _check_config(source, source.args)
        return
    for key, value in source.args.items():
        if key not in _ARGUMENTS or not (_is_plain(value) or _is_shape(value)):
            raise ModelError(f"{source}: refused argument {key!r} = {str(value)[:100]!r}; give the network itself.")


def _is_plain(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < _LARGEST
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) is bool or (type(value) is str and bool(_TEXT.fullmatch(value)))


def _is_shape(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) > 8:
        return False
    return all(type(v) is int and _is_plain(v) for v in value)


def _check_config(source: Source, config: Mapping[str, Any]) -> None:
    waiting: list[tuple[Any, Any, bool]] = [("", config, False)]
    count = 0
    while waiting:
        key, value, is_label = waiting.pop()
        count += 1
        if isinstance(value, Mapping):
            waiting += [(k, v, is_label or k in _LABELS) for k, v in value.items()]
            sound = all(type(k) is int or (type(k) is str and not k.startswith("__")) for k in value)
        elif isinstance(value, (list, tuple)):
            waiting += [(key, v, is_label) for v in value]
            sound = True
        else:
            sound = _is_plain(value) or (is_label and type(value) is str)
            sound &= not (type(value) is int and value > _MOST_LAYERS and _COUNTED.search(str(key)))
        if not sound or count + len(waiting) > _MOST or (value and _REFUSED.fullmatch(str(key))):
            raise ModelError(
                f"{source}: refused {key!r} = {str(value)[:100]!r} of its configuration, which may fetch something "
                "or run code; give the network itself."
            )


def keep_config_(small: nn.Module, original: nn.Module) -> None:
    """Have a smaller network of transformers remember the configurations it comes from, the oldest last (in place)."""
    if (config := _read_config(original)) is not None:
        vars(small)[_CONFIGS] = (config, *vars(original).get(_CONFIGS, ()))


def configs_of(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """The configurations of a network of transformers that it or its originals have or had, as `Source.args`."""
    config = _read_config(model)
    return () if config is None else (config, *vars(model).get(_CONFIGS, ()))


def _read_config(model: nn.Module) -> dict[str, Any] | None:
    if not type(model).__module__.startswith("transformers.models."):
        return None
    config: Any = getattr(model, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else None
    return None if found is None else {k: v for k, v in found.items() if k not in _DROPPED}


def _build_zoo(source: Source) -> nn.Module:
    return find_zoo(source.name).build(source.name)


def _build_torchvision(source: Source) -> nn.Module:
    models = find_torchvision(source.name)
    builder = models.get_model_builder(source.name)
    known = inspect.signature(builder).parameters
    return builder(**{k: None for k in ("weights", "weights_backbone") if k in known}, **source.args)


def _build_timm(source: Source) -> nn.Module:
    return find_timm(source.name).create_model(source.name, pretrained=False, **source.args)


def _build_hf(source: Source) -> nn.Module:
    found = find_transformers(source.name)
    return found(found.config_class.from_dict(dict(source.args)))


_BUILDERS = {
    SourceKind.ZOO: _build_zoo,
    SourceKind.TORCHVISION: _build_torchvision,
    SourceKind.TIMM: _build_timm,
    SourceKind.HF: _build_hf,
}
