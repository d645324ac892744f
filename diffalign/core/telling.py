"""Calls of the hooks of a run, by all processes together."""

from collections.abc import Iterable
from typing import Any, Protocol

from .errors import RewardError, reword
from .processes import Devices, Lockstep, together
from .report import Report


class Told(Protocol):
    """Interface of a hook, as `Hook` has it."""

    def start(self, loop: Any, step: int, total: int) -> None: ...

    def step(self, loop: Any, report: Report) -> None: ...

    def stop(self, loop: Any, step: int, error: BaseException | None) -> None: ...


class Telling(Protocol):
    """Part of a loop by which its processes keep together."""

    devices: Devices
    lockstep: Lockstep


def start_all(hooks: Iterable[Told], loop: Telling, step: int, total: int) -> None:
    """Tell every hook that the run begins. If a hook fails in one process, all stop.

    Raises:
        RewardError: a reward failed in an evaluation; the message says in which.
    """
    for hook in hooks:
        try:
            with together(loop.devices, loop.lockstep):
                hook.start(loop, step, total)
        except RewardError as error:
            _place(error, hook, step)
            raise


def step_all(hooks: Iterable[Told], loop: Telling, report: Report) -> None:
    """Show a finished step to every hook. If a hook fails in one process, all stop.

    A reward that fails in an evaluation takes nothing from the step: the hooks after it still see the step and keep it.

    Raises:
        RewardError: a reward failed in an evaluation; the message says in which. All hooks have seen the step.
    """
    failed: RewardError | None = None
    for hook in hooks:
        try:
            with together(loop.devices, loop.lockstep):
                hook.step(loop, report)
        except RewardError as error:
            _place(error, hook, report.step + 1)
            failed = failed or error
    if failed is not None:
        raise failed


def end_all(hooks: Iterable[Told], loop: Telling, step: int, error: BaseException | None) -> None:
    """Tell every hook that the run ends. If hooks fail, the first error is raised after all were told.

    Hooks after one in whose last evaluation a reward failed are told of that error, because the run is not complete then.

    Args:
        hooks: hooks of the run, in their order
        loop: the loop that ends
        step: number of steps done
        error: error that ended the run; it gets a note if a hook fails as well
    """
    failed: Exception | None = None
    for hook in hooks:
        try:
            if error is None:
                with together(loop.devices, loop.lockstep):  # so that all processes know of a reward that failed
                    hook.stop(loop, step, failed if isinstance(failed, RewardError) else None)
            else:
                hook.stop(loop, step, error)
        except Exception as caught:
            if isinstance(caught, RewardError):
                _place(caught, hook, step)
            failed = failed or caught
    if failed is not None and error is None:
        raise failed
    if failed is not None and error is not None:
        error.add_note(f"then, while stopping: {type(failed).__name__}: {failed}")


def _place(error: RewardError, hook: Told, step: int) -> None:
    """Put the place into the message of a reward that a hook asked."""
    reword(error, f"in the evaluation at step {step}, {type(hook).__name__}: {error}")
