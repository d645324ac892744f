"""Prompt sources."""

from .benchmark import geneval
from .files import PromptFile, Prompts, read_prompts, require_readable
from .lists import generated

__all__ = ["PromptFile", "Prompts", "generated", "geneval", "read_prompts", "require_readable"]
