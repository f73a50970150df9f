"""Several networks into one."""

from intrafusion.fusion.align import Alignment
from intrafusion.fusion.networks import Fused, fuse

__all__ = ["Alignment", "Fused", "fuse"]
