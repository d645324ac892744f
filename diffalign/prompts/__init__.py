"""Prompt sources."""

from .lists import PromptFile, Prompts, read_prompts, require_readable
from .mixture import Mixture, Source

__all__ = ["Mixture", "PromptFile", "Prompts", "Source", "read_prompts", "require_readable"]
