"""Prompt sources."""

from .files import PromptFile, Prompts, read_prompts, require_readable
from .lists import generated
from .benchmark import geneval

__all__ = ["PromptFile", "Prompts", "generated", "geneval", "read_prompts", "require_readable"]
