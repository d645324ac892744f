"""Trained weights for use elsewhere: as diffusers loads them, as ComfyUI does, or merged into a whole pipeline."""

from .card import Card
from .formats import FORMATS, Format, export
from .unwrapping import pipeline_policy

__all__ = ["FORMATS", "Card", "Format", "export", "pipeline_policy"]
