"""Hook that saves a student at the end of a run."""

import shutil
from pathlib import Path

import attrs

from diffalign.core import AlignmentLoop, Hook, Interrupted

from .tdm import TDMPolicy


@attrs.frozen
class StudentFiles(Hook):
    """Writes the student of a few-step run, or its average if the run has one, to `student/` in the run folder when the run ends.

    `TDMPolicy.from_saved` reads it. Before the first step it is written once to `student.tmp/` and removed again, so that nothing is left
    to fail when the work is done.

    Raises:
        ValueError: the run's policy is no `TDMPolicy`; raised before the first step.
    """

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        student = self._student(loop)
        if loop.folder is None:
            return
        trial = loop.folder / "student.tmp"
        if (loop.folder / "student").is_file():
            raise ValueError(f"StudentFiles writes the folder {loop.folder / 'student'}, but there is a file of that name. Move it away.")
        try:
            self._write(loop, student, trial)
        finally:
            if loop.devices.rank == 0:
                shutil.rmtree(trial, ignore_errors=True)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        finished = error is None or isinstance(error, Interrupted)
        if finished and loop.folder is not None:
            self._write(loop, self._student(loop), loop.folder / "student")

    def _write(self, loop: AlignmentLoop, student: TDMPolicy, folder: Path) -> None:
        tensors, base = student.gathered(), student.base_digest()  # in every process, because weights may be sharded
        if loop.devices.rank == 0:
            student.write(str(folder), tensors, base)

    def _student(self, loop: AlignmentLoop) -> TDMPolicy:
        policy = loop.evaluation_policy()
        if not isinstance(policy, TDMPolicy):
            raise ValueError(f"StudentFiles needs a run whose policy is a TDMPolicy; got a {type(policy).__name__}. Remove the hook.")
        return policy
