"""Several networks into one."""

from intrafusion.fusion.align import Alignment
from intrafusion.fusion.fuse import Fused, fuse

__all__ = ["Alignment", "Fused", "fuse"]
