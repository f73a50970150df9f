"""intrafusion: make a trained neural network smaller without retraining it, and prove each step."""

from __future__ import annotations

import lazy_loader

__version__ = "0.2.0"

# The names are listed in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
