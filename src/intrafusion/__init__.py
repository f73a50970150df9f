"""intrafusion: make a trained neural network smaller without retraining it, and prove each step."""

from __future__ import annotations

from typing import Any

import lazy_loader

__version__ = "0.2.0"

# The names are listed in __init__.pyi.
_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _import_name(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
