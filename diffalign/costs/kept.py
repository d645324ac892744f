"""Network rows whose graph a rollout keeps until the first update."""

import attrs

from ..core import AlignmentLoop
from ..core.interfaces import KeepsGraph
from ..samplers import Branching
from .activations import Activations


@attrs.frozen
class Kept:
    """Rows of the policy whose graph a rollout keeps, whatever the row budget.

    Args:
        rows: their number for one prompt; 0 if none is kept
        spares: rows of a prompt that the first update need not evaluate, because it goes back through the graph: all, if the objective
            replays each stochastic edge, else 0
        updates: number of updates of a step
    """

    rows: int
    spares: int
    updates: int

    @classmethod
    def of(cls, loop: AlignmentLoop, tree: Branching, update: int | None) -> "Kept":
        """Read them off a sampler.

        Args:
            loop: the built loop
            tree: tree of its sampler
            update: rows of an update for one prompt; None if they are not known
        """
        rows = tree.replay_rows if isinstance(loop.sampler, KeepsGraph) and loop.sampler.keep_graph else 0
        return cls(rows, rows if update == rows else 0, max(phase.repeats for phase in loop.objective.phases()))

    @property
    def evaluated(self) -> int:
        """Updates of a step that evaluate their rows."""
        return self.updates - bool(self.spares)

    def bytes(self, activations: Activations, rows: int, prompts: int) -> int:
        """Bytes that live at once in the updates of a step.

        Args:
            activations: bytes by rows
            rows: rows that an update evaluates at once
            prompts: prompts of a step on the device
        """
        kept, evaluated = activations.at(self.rows * prompts), activations.at(rows if self.evaluated else 0)
        return max(kept, evaluated) if self.spares else kept + evaluated
