"""Line of a user's own code at which an error arose."""

import sysconfig
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARY = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
_MADE = ("<frozen", "<attrs generated")
"""Beginnings of the names of code that has no file."""


def own_line(error: BaseException) -> str:
    """'file, line' of the last frame outside the package and its libraries: the line that a user wrote. '' where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def at_own_line(error: BaseException) -> str:
    """' (file, line)' of `own_line`, to end a message with. '' where there is none."""
    line = own_line(error)
    return f" ({line})" if line else ""


def _is_users(file: str) -> bool:
    return not ({"site-packages", "dist-packages"} & set(Path(file).parts)) and not file.startswith((_PACKAGE, *_LIBRARY, *_MADE))
