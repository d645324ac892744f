"""Folder of a run: writing it, checkpoints, and reading it again."""

from .checkpoints import Checkpoints
from .console import Console
from .pictures import FirstAndLast
from .recording import Recorder
from .signs import Signs

__all__ = ["Checkpoints", "Console", "FirstAndLast", "Recorder", "Signs"]
