"""Adapters from diffusers pipelines to the conventions of this package: one small file per model family."""

from .family import Family, PlainSteps, Setting
from .loading import Loaded, families, load_family
from .quantization import Quantization, is_quantized
from .source import Source, require_pipeline

__all__ = [
    "Family",
    "Loaded",
    "PlainSteps",
    "Quantization",
    "Setting",
    "Source",
    "families",
    "is_quantized",
    "load_family",
    "require_pipeline",
]
