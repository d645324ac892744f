"""The row budget: how much is computed at once, and how it shrinks when memory runs out."""

from typing import TYPE_CHECKING, Any

import attrs
import torch

from .ledger import Ledger

if TYPE_CHECKING:
    from .loop import AlignmentLoop

_STAGES = {"decode": 1, "reward": 1, "rollout": 2, "contract": 2, "update": 3}
"""What is made smaller: the images of a chunk, the sampler's rows, the objective's rows."""


def shrink(loop: "AlignmentLoop", ledger: Ledger, error: torch.OutOfMemoryError) -> str:
    """Halve the budget of the stage that ran out of memory, in all processes alike.

    Results do not depend on a budget, so the step can simply be repeated.

    Args:
        loop: whose budget it is
        ledger: of the step that failed
        error: what it said

    Returns:
        A sentence that says what was done.

    Raises:
        torch.OutOfMemoryError: nothing is left to halve.
    """
    largest = max((policy.counter.largest for policy in loop.policies().values()), default=0)
    here = torch.tensor([_STAGES.get(ledger.failed or "", 0), largest])
    stage, largest = (int(value) for value in loop.devices.maximum(here))
    if loop.sharding is not None:
        raise torch.OutOfMemoryError(
            f"{error}\nThe weights are sharded, so the run ends instead of repeating the step: where memory runs out inside a call, the "
            f"other processes wait in it. Go on by --resume with {_advice(stage, largest)}."
        ) from error
    if stage == 1 and loop.chunk > 1:
        loop.chunk = max(1, loop.chunk // 2)
        return f"out of memory while decoding or scoring: chunk is {loop.chunk} from now on, in all {loop.devices.size} processes"
    rows = largest // 2
    owner = {2: loop.sampler, 3: loop.objective}.get(stage)
    if not _has_rows(owner) or rows < 1 or rows >= (getattr(owner, "rows", None) or largest):
        raise torch.OutOfMemoryError(f"{error}\nNothing is left to halve. Try {_advice(stage, 2)}.") from error
    if stage == 2:
        loop.sampler = attrs.evolve(loop.sampler, rows=rows)  # type: ignore[misc]
    else:
        _set_rows(loop.objective, rows)
    what = "sampler" if stage == 2 else "objective"
    return f"out of memory after calls of up to {largest} rows: {what}.rows is {rows} from now on, in all {loop.devices.size} processes"


def _has_rows(owner: object) -> bool:
    return attrs.has(type(owner)) and "rows" in attrs.fields_dict(type(owner))  # type: ignore[arg-type]


def _set_rows(owner: Any, rows: int) -> None:
    """Of an objective, and of the values in its fields to which it has passed its budget on."""
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
