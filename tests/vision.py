"""Imports torchvision where its compiled part does not load (a wheel from another index than PyTorch's).

Then torchvision's operators do not exist, and registering their shape functions fails the whole import, although
models built from plain layers never use them. Here those registrations are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def import_torchvision() -> None:
    register = torch.library.register_fake

    def skipping(operator: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if str(operator).startswith("torchvision::"):
            return lambda function: function
        return register(operator, *args, **kwargs)

    torch.library.register_fake = skipping
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register
