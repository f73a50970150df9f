"""compress() as the paper has it: Intra-Fusion, nothing restored."""

from __future__ import annotations

from typing import Any

import intrafusion


def compress(model: Any, example: Any, keep: Any = None, **options: Any) -> intrafusion.Compressed:
    return intrafusion.compress(model, example, keep, **{"reducer": "intrafusion", "restore": None, **options})
