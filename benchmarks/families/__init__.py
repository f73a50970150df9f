"""Families of networks in small random configurations, and what judges a smaller network; for compatibility.py."""

from __future__ import annotations

from .by_hand import BY_HAND
from .family import Family
from .hugging_face import HUGGING_FACE
from .vision import TIMM, TORCHVISION

FAMILIES: dict[str, Family] = {f.name: f for f in (*TORCHVISION, *TIMM, *HUGGING_FACE, *BY_HAND)}
