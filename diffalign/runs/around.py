"""Run of a loop from Python: a folder, progress and a result around its steps."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from ..core import AlignmentLoop, ConfigError, Hook, Outcome, Report, RewardError
from ..core.errors import reword
from ..core.given import require_steps
from ..core.report import plain
from ..core.unessential import say
from ..costs.filling import Filling
from .checkpoints import Checkpoints, require_none_after
from .console import Console
from .folder import has_begun, require_writable
from .lock import FolderLock
from .pictures import FirstAndLast
from .recording import Recorder
from .settings import settings_of
from .signs import Signs
from .snapshot import checkpoints, going_on


@attrs.define(eq=False)
class _Noted(Hook):
    """Keeps the metrics of every step."""

    lines: list[Mapping[str, float]] = attrs.field(factory=list, init=False)
    steps: int = attrs.field(default=0, init=False)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        self.lines.append(plain(report.metrics))

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        self.steps = step


def run(
    loop: AlignmentLoop, total: int, start: int = 0, *, folder: str | Path | None = None, resume: bool = False, show: bool | None = None
) -> Outcome:
    """Run a loop, see `AlignmentLoop.run`.

    Raises:
        ConfigError: `resume` without a folder, or a folder that holds a run, is being trained in, or cannot be written.
        CheckpointError: the folder's checkpoints are damaged, or one comes after `start`. No file of the run is changed.
        RewardError: a reward failed; the message names the checkpoint of the last finished step.
    """
    require_steps(total, start)  # before the folder is made
    if folder is None:
        if resume:
            raise ConfigError("resume needs the folder of the run: loop.run(60, folder=..., resume=True)")
        return _advanced(loop, total, start, [], show)
    place = Path(folder)
    require_writable(place)
    with FolderLock(place, loop.devices) as lock:
        lock.take()
        if not resume and start == 0 and has_begun(place):
            raise ConfigError(f"folder {place} must not hold another run; it has steps of one. Give resume=True, or another folder.")
        if not resume:
            require_none_after(place, start)  # before a hook cuts what the run has recorded
        loop.folder = place
        keeping = Checkpoints(place, settings=settings_of(loop, total))
        if resume and checkpoints(place):  # if all are damaged, `restore` says so: to begin anew would take their place
            start = keeping.restore(loop)
            if total < start and loop.devices.rank == 0:
                say(f"{place} has {start} steps already, so a total of {total} adds none. Give a larger one to go on.")
            total = max(total, start)
        try:
            return _advanced(loop, total, start, [FirstAndLast(place), Recorder(place, name=place.name), keeping], show)
        except RewardError as error:
            advice = f"Continue by: loop.run({total}, folder={str(place)!r}, resume=True)"
            reword(error, f"{str(error).rstrip('.')}; {going_on(place, advice)}")
            raise


def _advanced(loop: AlignmentLoop, total: int, start: int, hooks: Sequence[Hook], show: bool | None) -> Outcome:
    noted, begun = _Noted(), time.monotonic()
    also: list[Hook] = [noted, Filling(), Signs(), *hooks]
    if _is_watched() if show is None else show:
        also.append(Console(stderr=True))
    loop.advance(total, start, also)
    return Outcome(noted.steps, tuple(noted.lines), time.monotonic() - begun, loop.folder)


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
