"""Checkpoints: everything a run needs to go on as if it had never stopped; which of them stay, and where a run goes on."""

import math
import os
import shutil
from pathlib import Path

import attrs

from .core import AlignmentLoop, CheckpointError, Hook, Interrupted, Report, agree
from .durable import discard, publish
from .identity import differences
from .snapshot import CONFIG, Snapshot, checkpoints, complete_checkpoints, is_whole, load, load_weights, read_manifest, save, step_of, write

__all__ = ["Checkpoints", "complete_checkpoints", "load", "load_weights", "read_manifest", "save"]

BEST = "best"


@attrs.define(eq=False)
class Checkpoints(Hook):
    """Writes `step-NNNNNN/` every `every` steps, at the end, and when the run is interrupted; the best of them stays as `best/`.

    The best is the one before which, since the checkpoint before, the raw reward was highest on average.

    Args:
        folder: of the run
        every: steps between checkpoints
        config: resolved configuration, which the checkpoint holds
        keep: how many of the last are kept
    """

    folder: Path
    every: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    config: str = ""
    keep: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    _saved: int | None = attrs.field(default=None, init=False)
    _rewards: list[float] = attrs.field(factory=list, init=False)

    def restore(self, loop: AlignmentLoop) -> int:
        """Load the last whole checkpoint of the folder; returns the steps done.

        Raises:
            CheckpointError: there is none.
        """
        return load(loop, self._last())

    def resume(self, loop: AlignmentLoop, new_total: bool = False) -> int:
        """As `restore`, for a run that goes on: only from a checkpoint of the same configuration.

        Args:
            loop: as built from `config`
            new_total: another total is no other run, although schedules run over it

        Raises:
            CheckpointError: there is none, or it is of another configuration; the message shows the difference.
        """
        last = self._last()
        self.require_same_run(last, new_total)
        return load(loop, last)

    def require_same_run(self, written: Path, new_total: bool = False) -> None:
        """Refuse a checkpoint, or a run folder, that holds another configuration.

        Args:
            written: the folder with its `config.yaml`; one without is not refused
            new_total: as in `resume`

        Raises:
            CheckpointError: the message shows the difference.
        """
        file = written / CONFIG
        changed = differences(file.read_text(), self.config) if file.exists() else []
        if changed := [change for change in changed if not (new_total and change[0] == "total")]:
            shown = "; ".join(f"{path} was {before}, is now {after}" for path, before, after in changed[:8])
            more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
            total = " (a new total is accepted with --new-total)" if any(path == "total" for path, *_ in changed) else ""
            raise CheckpointError(f"{written} is of another configuration: {shown}{more}. Give the same values, or another folder{total}.")

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if loop.devices.rank == 0 and self.folder.exists():
            for name in (f"{BEST}.tmp", f"{BEST}.old.tmp"):  # a crash between the two names of the best
                if not (self.folder / BEST).exists() and is_whole(self.folder / name, quiet=True):
                    (self.folder / name).rename(self.folder / BEST)
            for left in self.folder.glob("*.tmp"):  # a crash while writing
                if left.name.startswith(("step-", f"{BEST}.")) and left.is_dir():
                    shutil.rmtree(left)
            later = [path for path in complete_checkpoints(self.folder, quiet=True) if step_of(path) > step]
            if later:
                raise CheckpointError(
                    f"{self.folder} must hold no checkpoint after step {step}, at which this run starts; it has {later[-1].name}, which is "
                    "of another run. Give another folder, or remove it."
                )
        self._saved = step if step else None
        self._rewards = []

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        self._rewards.append(report.metrics["reward"])
        if (report.step + 1) % self.every == 0:
            self._save(loop, report.step + 1)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        # weights and optimizers fit together at the end, and when a signal waited for the end of its step; not after an error
        if (error is None or isinstance(error, Interrupted)) and step != self._saved:
            self._save(loop, step)

    def _last(self) -> Path:
        found = complete_checkpoints(self.folder)
        if not found:
            raise CheckpointError(f"{self.folder} must hold a checkpoint step-*/ to resume from; there is none")
        return found[-1]

    def _save(self, loop: AlignmentLoop, step: int) -> None:
        snapshot, failed = Snapshot.of(loop), None
        if loop.devices.rank == 0:
            score = sum(self._rewards) / len(self._rewards) if self._rewards else None
            try:
                write(snapshot, self.folder / f"step-{step:06d}", {"step": step, "reward": loop.reward, "score": score}, self.config)
                self._keep_best(self.folder / f"step-{step:06d}", score)
                self._prune(step)
            except (CheckpointError, OSError) as error:
                failed = error
        agree(loop.devices, failed)
        self._saved, self._rewards = step, []

    def _keep_best(self, new: Path, score: float | None) -> None:
        if score is None or score <= self._best_score():
            return
        temporary = self.folder / f"{BEST}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file in new.iterdir():
            try:
                os.link(file, temporary / file.name)
            except OSError:  # a file system without hard links
                shutil.copy2(file, temporary / file.name)
        publish(temporary, self.folder / BEST)

    def _best_score(self) -> float:
        try:
            return float(read_manifest(self.folder / BEST)["score"])
        except (CheckpointError, KeyError, TypeError):
            return -math.inf

    def _prune(self, step: int) -> None:
        """Keep the last few up to `step`; what is damaged has been passed over when this run started."""
        found = checkpoints(self.folder)
        done = [path for path in found if step_of(path) <= step]
        for path in [*done[: -self.keep], *(path for path in found if step_of(path) > step)]:
            discard(path)
