"""Run of a loop from Python: a folder, progress and a result around its steps."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import attrs

from ..core import AlignmentLoop, ConfigError, Hook, Outcome, Report
from ..costs.filling import Filling
from .checkpoints import Checkpoints
from .console import Console
from .folder import has_begun, require_writable
from .pictures import FirstAndLast
from .recording import Recorder
from .signs import Signs
from .snapshot import complete_checkpoints


@attrs.define(eq=False)
class _Noted(Hook):
    """Keeps the metrics of every step."""

    lines: list[Mapping[str, float]] = attrs.field(factory=list, init=False)
    steps: int = attrs.field(default=0, init=False)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        self.lines.append(dict(report.metrics))

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        self.steps = step


def run(
    loop: AlignmentLoop, total: int, start: int = 0, *, folder: str | Path | None = None, resume: bool = False, show: bool | None = None
) -> Outcome:
    """Run a loop, see `AlignmentLoop.run`.

    Raises:
        ConfigError: `resume` without a folder, or a folder that holds a run or cannot be written.
    """
    place = None if folder is None else Path(folder)
    if resume and place is None:
        raise ConfigError("resume needs the folder of the run: loop.run(60, folder=..., resume=True)")
    noted, begun = _Noted(), time.monotonic()
    also: list[Hook] = [noted, Filling(), Signs()]
    before = loop.folder
    if place is not None:
        require_writable(place)
        if not resume and start == 0 and has_begun(place):
            raise ConfigError(f"folder {place} must not hold another run; it has steps of one. Give resume=True, or another folder.")
        loop.folder = place
        checkpoints = Checkpoints(place)
        if resume and complete_checkpoints(place):
            start = checkpoints.restore(loop)
            total = max(total, start)
        also += [FirstAndLast(place), Recorder(place, name=place.name), checkpoints]
    if _is_watched() if show is None else show:
        also.append(Console(stderr=True))
    try:
        loop.advance(total, start, also)
    finally:
        loop.folder = place or before
    return Outcome(noted.steps, tuple(noted.lines), time.monotonic() - begun, loop.folder)


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
