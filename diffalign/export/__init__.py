"""Export of trained weights: for diffusers, for ComfyUI, or merged into a whole pipeline."""

from .card import Card
from .formats import FORMATS, Format, export
from .unwrapping import pipeline_policy

__all__ = ["FORMATS", "Card", "Format", "export", "pipeline_policy"]
