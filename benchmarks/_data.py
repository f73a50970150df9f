"""What benchmarks share that need real data."""

from __future__ import annotations

import os


def has_data(holds: str = "cifar10.npz and models/") -> bool:
    """Whether INTRAFUSION_DATA is set; if not, it is said that the benchmark is skipped, and what has to be there."""
    if os.environ.get("INTRAFUSION_DATA"):
        return True
    print(f"skipped: INTRAFUSION_DATA is not set; it names the folder with {holds}.")
    return False
