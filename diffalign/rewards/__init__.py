"""Rewards that need nothing but the base install."""

from .combine import WeightedSum
from .compressibility import JPEGCompressibility

__all__ = ["JPEGCompressibility", "WeightedSum"]
