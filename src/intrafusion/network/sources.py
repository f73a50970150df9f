"""Packages of networks: the zoo, torchvision, timm and transformers; imported when a network of theirs is wanted."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch

from intrafusion.errors import ModelError, unknown_name

MISFIT = (
    "this torchvision was built for another PyTorch; install both from one place: "
    "pip install --force-reinstall torch torchvision"
)


class SourceKind(StrEnum):
    """Packages of networks, each of which has a name there."""

    ZOO = "zoo"
    TORCHVISION = "torchvision"
    TIMM = "timm"
    HF = "hf"


def find_zoo(name: str) -> ModuleType:
    """The zoo, which has a model of this name. It is a package as the others are, imported when it is asked for."""
    zoo = importlib.import_module("intrafusion.lab.zoo")
    if name not in zoo.names():
        raise ModelError(unknown_name("zoo model", name, zoo.names()))
    return zoo


def find_torchvision(name: str) -> ModuleType:
    """torchvision.models, which has a model of this name."""
    with needing("torchvision"):
        models = import_torchvision().models
    if name not in models.list_models():
        raise ModelError(unknown_name("torchvision model", name, models.list_models()))
    return models


def list_classifiers(models: ModuleType) -> list[str]:
    """Those of torchvision's models that read one image and return one label, not detectors or video networks."""
    return models.list_models(module=models)


def find_timm(name: str) -> ModuleType:
    """timm, which has a model of this name."""
    with needing("timm"):
        import_torchvision()
        timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise ModelError(unknown_name("timm model", name, timm.list_models()))
    return timm


def find_transformers(name: str) -> Any:
    """The class of this name, a network of transformers itself."""
    with needing("transformers"):
        transformers = import_transformers()
    found = getattr(transformers, name, None)
    if not _is_network_of(transformers, found):
        raise ModelError(f"transformers has no network {name!r}; expected the name of one of its classes.")
    return found


def _is_network_of(transformers: Any, found: Any) -> bool:
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return False
    return found.__module__.startswith("transformers.models.")


def import_transformers() -> ModuleType:
    """transformers, also where torchvision's operators do not load, see `import_torchvision`."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    return importlib.import_module("transformers")


@contextmanager
def needing(name: str) -> Iterator[None]:
    """Say how to install an optional package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in (name, "torchvision"):
            raise
        raise ModelError(f"{error.name} is not installed; run: pip install 'intrafusion[{name}]'") from error


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not load beside this build of PyTorch.

    Its published wheels are compiled for CUDA. Beside a CPU-only PyTorch the import fails as it describes its operators
    (`nms`, `roi_align`, ...) to the compiler; without these descriptions everything but the operators works.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ModelError(f"torchvision cannot be imported (RuntimeError: {error}); {MISFIT}.") from error
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left half done
    try:
        with _without_fake_operators("torchvision"):
            return importlib.import_module("torchvision")
    except (RuntimeError, AttributeError) as error:
        raise ModelError(f"torchvision cannot be imported ({type(error).__name__}: {error}); {MISFIT}.") from error


@contextmanager
def _without_fake_operators(namespace: str) -> Iterator[None]:
    register = torch.library.register_fake

    def skipping(op: Any, *args: Any, **kwargs: Any) -> Any:
        return (lambda function: function) if str(op).startswith(f"{namespace}::") else register(op, *args, **kwargs)

    torch.library.register_fake = skipping
    try:
        yield
    finally:
        torch.library.register_fake = register
