"""Row budget: limits how much is computed at once. It is halved when memory runs out."""

from typing import TypeVar

import attrs
import torch

from .interfaces import Budgeted, Objective, Stateful, TrajectorySampler
from .processes import Devices

T = TypeVar("T")

_STAGES = {"decode": 1, "reward": 1, "rollout": 2, "contract": 2, "update": 3}
"""Budget that is halved for a stage: 1 the images of a chunk, 2 the sampler's rows, 3 the objective's rows."""


@attrs.frozen(eq=False)
class Budgets:
    """Row budgets with which a step is repeated.

    Args:
        sampler: sampler whose `rows` limit one network call of the rollout
        rows: limit of one network call of the update, for the objective; None takes all at once
        chunk: images that are decoded and scored at once
        said: a sentence that says what has changed
    """

    sampler: TrajectorySampler
    rows: int | None
    chunk: int
    said: str


def shrink(
    sampler: TrajectorySampler,
    objective: Objective,
    chunk: int,
    devices: Devices,
    failed: str,
    largest: int,
    error: torch.OutOfMemoryError,
    sharded: bool,
) -> Budgets:
    """Halve the budget of the stage that ran out of memory, in all processes alike.

    Results do not depend on a budget, so the step can simply be repeated.

    Args:
        sampler: sampler of the run
        objective: objective of the run
        chunk: images that are decoded and scored at once
        devices: the processes of the run
        failed: the stage that ran out of memory in this process; "" where none did
        largest: rows of the largest network call of that step, in this process
        error: its message
        sharded: whether weights are spread over the processes

    Returns:
        Budgets with which the run continues. Nothing is changed here.

    Raises:
        torch.OutOfMemoryError: nothing is left to halve.
    """
    here = torch.tensor([_STAGES.get(failed, 0), largest])
    stage, largest = (int(value) for value in devices.maximum(here))
    if sharded:
        raise torch.OutOfMemoryError(
            f"{error}\nThe weights are sharded, so the step cannot be repeated: the other processes may be waiting inside the network "
            f"call that failed. Continue by --resume with {_advice(stage, largest)}."
        ) from error
    everywhere = f"from now on, in all {devices.size} processes"
    if stage == 1 and chunk > 1:
        fewer = max(1, chunk // 2)
        said = f"out of memory while decoding or scoring: chunk is {fewer} {everywhere}"
        return Budgets(sampler, rows_of(objective), fewer, said)
    owner = {2: sampler, 3: objective}.get(stage)
    present = min(largest, rows_of(owner) or largest)  # the contract's calls may be larger than the budget
    rows = present // 2
    if not has_rows(owner) or rows < 1:
        if stage > 1 and present == 1:
            said = f"One network row of the {failed or 'step'} does not fit the memory of this device. Try {_smaller(stage)}."
        else:
            said = f"Nothing is left to halve. Try {_advice(stage, present)}."
        raise torch.OutOfMemoryError(f"{error}\n{said}") from error
    what = "sampler" if stage == 2 else "objective"
    said = f"out of memory after calls of up to {largest} rows: {what}.rows is {rows} {everywhere}"
    if stage == 2:
        return Budgets(limited(sampler, rows), rows_of(objective), chunk, said)
    return Budgets(sampler, rows, chunk, said)


def rows_of(part: object) -> int | None:
    """Row budget of a part; None where it has none, or takes all rows at once."""
    return part.rows if isinstance(part, Budgeted) else None


def limited(part: T, rows: int | None) -> T:
    """A sampler or objective with another row budget: a sampler is made anew, with its state; an objective takes it in place."""
    if not has_rows(part) or rows_of(part) == rows:
        return part
    if isinstance(part, Objective):
        part.rows = rows  # type: ignore[attr-defined]
        return part
    made: T = attrs.evolve(part, rows=rows)  # type: ignore[misc]
    if isinstance(part, Stateful) and isinstance(made, Stateful):
        made.restore(part.state())
    return made


def has_rows(owner: object) -> bool:
    """True if the part has a row budget that can be changed."""
    return attrs.has(type(owner)) and "rows" in attrs.fields_dict(type(owner))  # type: ignore[arg-type]


def _advice(stage: int, largest: int) -> str:
    if stage == 1:
        return "a smaller --chunk"
    name = "--sampler.rows" if stage == 2 else "--objective.rows"
    return f"{name} {max(1, largest // 2)}, fewer --prompts_per_step, or more processes"


def _smaller(stage: int) -> str:
    checkpointing = "--policy.checkpointing true, " if stage == 3 else ""
    return f"{checkpointing}--policy.dtype bfloat16 with LoRA, a smaller --policy.resolution, or --shard over more devices"
