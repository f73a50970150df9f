"""Smooth compression: layers of lower rank along their singular values."""

from intrafusion.factorize.layers import Factorized, factorize, spectra
from intrafusion.factorize.penalties import Smooth
from intrafusion.factorize.ranks import RULES, Energy, Global, RankRule, Share
from intrafusion.factorize.svd import Spectrum, spectrum

__all__ = [
    "RULES",
    "Energy",
    "Factorized",
    "Global",
    "RankRule",
    "Share",
    "Smooth",
    "Spectrum",
    "factorize",
    "spectra",
    "spectrum",
]
