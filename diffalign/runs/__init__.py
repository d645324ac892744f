"""Folder of a run: writing it, checkpoints, and reading it again."""

from .checkpoints import Checkpoints
from .console import Console
from .pictures import FirstAndLast
from .recording import Recorder
from .signs import Signs
from .snapshot import load_weights

__all__ = ["Checkpoints", "Console", "FirstAndLast", "Recorder", "Signs", "load_weights"]
