"""Prompt sources."""

from .benchmark import geneval
from .files import PromptFile, Prompts, read_prompts, require_readable
from .lists import generated
from .mixture import Mixture, Source

__all__ = ["Mixture", "PromptFile", "Prompts", "Source", "generated", "geneval", "read_prompts", "require_readable"]
