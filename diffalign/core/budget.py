"""Row budget: limits how much is computed at once. It is halved when memory runs out."""

from typing import Any, TypeVar

import attrs
import torch

from .interfaces import Budgeted, Objective, TrajectorySampler
from .ledger import Ledger
from .processes import Devices

T = TypeVar("T")

_STAGES = {"decode": 1, "reward": 1, "rollout": 2, "contract": 2, "update": 3}
"""Budget that is halved for a stage: 1 the images of a chunk, 2 the sampler's rows, 3 the objective's rows."""


@attrs.frozen(eq=False)
class Budgets:
    """Parts of a run that have a row budget.

    Args:
        sampler: its `rows` limit one network call of the rollout
        objective: its `rows` limit one network call of the update
        chunk: images that are decoded and scored at once
    """

    sampler: TrajectorySampler
    objective: Objective
    chunk: int


def shrink(
    budgets: Budgets, ledger: Ledger, error: torch.OutOfMemoryError, largest: int, devices: Devices, sharded: bool
) -> tuple[Budgets, str]:
    """Halve the budget of the stage that ran out of memory, in all processes alike.

    Results do not depend on a budget, so the step can simply be repeated.

    Args:
        budgets: budgets of the run; the objective's `rows` are changed in place
        ledger: ledger of the step that failed
        error: error of the step that failed
        largest: rows of the largest network call of that step, in this process
        devices: the processes of the run
        sharded: whether weights are spread over them

    Returns:
        The new budgets, and a sentence for the user that says what was halved.

    Raises:
        torch.OutOfMemoryError: nothing is left to halve.
    """
    here = torch.tensor([_STAGES.get(ledger.failed or "", 0), largest])
    stage, largest = (int(value) for value in devices.maximum(here))
    if sharded:
        raise torch.OutOfMemoryError(
            f"{error}\nThe weights are sharded, so the step cannot be repeated: the other processes may be waiting inside the network "
            f"call that failed. Continue by --resume with {_advice(stage, largest)}."
        ) from error
    if stage == 1 and budgets.chunk > 1:
        chunk = max(1, budgets.chunk // 2)
        said = f"out of memory while decoding or scoring: chunk is {chunk} from now on, in all {devices.size} processes"
        return attrs.evolve(budgets, chunk=chunk), said
    rows = largest // 2
    owner = {2: budgets.sampler, 3: budgets.objective}.get(stage)
    if not _has_rows(owner) or rows < 1 or rows >= (rows_of(owner) or largest):
        raise torch.OutOfMemoryError(f"{error}\nNothing is left to halve. Try {_advice(stage, 2)}.") from error
    what = "sampler" if stage == 2 else "objective"
    said = f"out of memory after calls of up to {largest} rows: {what}.rows is {rows} from now on, in all {devices.size} processes"
    if stage == 2:
        return attrs.evolve(budgets, sampler=attrs.evolve(budgets.sampler, rows=rows)), said  # type: ignore[misc]
    _set_rows(budgets.objective, rows)
    return budgets, said


def rows_of(part: object) -> int | None:
    """Row budget of a part; None where it has none, or takes all rows at once."""
    return part.rows if isinstance(part, Budgeted) else None


def limited(part: T, rows: int) -> T:
    """A sampler or objective with another row budget: a sampler is made anew, an objective takes it in place."""
    if not _has_rows(part):
        return part
    if isinstance(part, Objective):
        _set_rows(part, rows)
        return part
    return attrs.evolve(part, rows=rows)  # type: ignore[misc]


def _has_rows(owner: object) -> bool:
    return attrs.has(type(owner)) and "rows" in attrs.fields_dict(type(owner))  # type: ignore[arg-type]


def _set_rows(owner: Any, rows: int) -> None:
    """Set `rows` on an objective and on every field of it that keeps a copy."""
    for field in attrs.fields(type(owner)):
        inner = getattr(owner, field.name, None)
        if _has_rows(inner):
            setattr(owner, field.name, attrs.evolve(inner, rows=rows))  # type: ignore[misc]
    owner.rows = rows


def _advice(stage: int, largest: int) -> str:
    if stage == 1:
        return "a smaller --chunk"
    name = "--sampler.rows" if stage == 2 else "--objective.rows"
    return f"{name} {max(1, largest // 2)}, fewer --prompts_per_step, or more processes"
