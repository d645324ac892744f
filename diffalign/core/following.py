"""Weights that follow those of another policy."""

import attrs

from .policy import Policy
from .schedule import Scalar, scalar
from .types import Progress


@attrs.frozen
class Follower:
    """Moves one policy towards another with the same parameters: target <- d target + (1 - d) source.

    Tensors that both share stay as they are.

    Args:
        decay: d in [0, 1], the share of itself that the target keeps: 0 copies the source, 1 never moves; a number or a schedule
        every: steps between two moves
        name: name of the decay in error messages
    """

    decay: Scalar | float
    every: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    name: str = "decay"

    def kept(self, progress: Progress) -> float:
        """Decay d at this step of the run.

        Raises:
            ValueError: it does not lie in [0, 1].
        """
        share = scalar(self.decay)(progress)
        if not 0 <= share <= 1:
            raise ValueError(f"{self.name} must lie in [0, 1]; got {share:g} at step {progress.step}")
        return share

    def move(self, target: Policy, source: Policy, progress: Progress) -> None:
        """Follow once, after a step of the run.

        Args:
            target: policy that moves
            source: policy that is followed
            progress: progress at the step that has just been done
        """
        kept = self.kept(progress)
        if (progress.step + 1) % self.every == 0:
            target.lerp_(source, 1 - kept)
