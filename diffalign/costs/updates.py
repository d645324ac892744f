"""Network rows of the updates of a step, as the objective of a run says them."""

from ..core import AlignmentLoop, UpdateRows
from ..samplers import Branching
from .roofline import pieces


def step_rows(loop: AlignmentLoop) -> UpdateRows | None:
    """Rows of all updates of a step for one prompt; None where `rows_at_once` of the policy and of a reference are all."""
    outline = loop.sampler.outline(loop.objective.behavior())
    return None if outline is None else loop.objective.step_rows(outline)


def rows_at_once(loop: AlignmentLoop, tree: Branching) -> int | None:
    """Largest number of rows of one policy that a loss evaluates with gradient for one prompt; None if it is not known."""
    rows = step_rows(loop)
    return loop.objective.update_rows(tree.leaves, tree.replay_rows) if rows is None else max(rows.trained, default=0)


def calls_of(rows: UpdateRows, groups: int, budget: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows of each call of the updates on a device, with gradient and without.

    Args:
        rows: rows of a prompt
        groups: prompts of the device
        budget: largest number of rows of a call; None takes those of a loss at once
    """

    def split(losses: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(call for loss in losses for call in pieces(loss * groups, budget))

    again = tuple(loss for loss in rows.compared if budget is not None and loss * groups > budget)
    return split(rows.trained), split(rows.frozen + again)
