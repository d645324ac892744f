"""Hook that saves a student at the end of a run."""

import attrs

from diffalign.core import AlignmentLoop, Hook, Interrupted

from .tdm import TDMPolicy


@attrs.frozen
class StudentFiles(Hook):
    """Writes the student of a few-step run, or its average if the run has one, to `student/` in the run folder when the run ends.

    `TDMPolicy.from_saved` reads it.

    Raises:
        ValueError: the run's policy is no `TDMPolicy`; raised before the first step.
    """

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._student(loop)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        finished = error is None or isinstance(error, Interrupted)
        if finished and loop.folder is not None:
            student = self._student(loop)
            tensors, base = student.gathered(), student.base_digest()  # in every process, because weights may be sharded
            if loop.devices.rank == 0:
                student.write(str(loop.folder / "student"), tensors, base)

    def _student(self, loop: AlignmentLoop) -> TDMPolicy:
        policy = loop.evaluation_policy()
        if not isinstance(policy, TDMPolicy):
            raise ValueError(f"StudentFiles needs a run whose policy is a TDMPolicy; got a {type(policy).__name__}. Remove the hook.")
        return policy
