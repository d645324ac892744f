"""The folder of a run: what is written, checkpoints, and what can be read out of it again."""

from .checkpoints import Checkpoints
from .console import Console
from .pictures import FirstAndLast
from .recording import Recorder
from .signs import Signs

__all__ = ["Checkpoints", "Console", "FirstAndLast", "Recorder", "Signs"]
