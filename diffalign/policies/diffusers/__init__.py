"""Adapters between diffusers pipelines and the house conventions: one small file per model family."""

from .family import Family, Setting
from .loading import Loaded, families, load_family

__all__ = ["Family", "Loaded", "Setting", "families", "load_family"]
