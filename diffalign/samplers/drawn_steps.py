"""Deterministic trajectories whose number of steps is drawn anew at each training step."""

from collections.abc import Sequence

import attrs
import torch

from diffalign.core import Condition, Outline, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.core.number_fields import is_whole, whole

from .deterministic import DeterministicSampler
from .frontier import foreseen
from .plans import Branching


@attrs.frozen
class DrawnSteps(TrajectorySampler):
    """Draws a number of steps, then deterministic trajectories of that length. For a student of several lengths, `TDMPolicy(also=[1, 2])`.

    All prompts of a training step share one number, drawn uniformly from `steps`. It depends only on the run's seed and the training
    step, so it is equal in all processes and after a resume. The prompts are encoded anew for the drawn number, so the batch holds it.
    A policy that allows any number of steps is sampled on its own grid.

    Args:
        steps: numbers of steps to draw from; a number that stands twice is twice as likely
        samples: number K of trajectories per prompt
        rows: network rows per call; None takes all at once

    Raises:
        ValueError: `steps` is empty or holds a number below 1, the student is not trained for a number, or a prompt is encoded alike for
            two numbers because the network reads no text or cuts its end.
    """

    steps: Sequence[int] = attrs.field(default=(1, 2, 4))
    samples: int = attrs.field(default=1, validator=whole(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))

    @steps.validator
    def _counts(self, attribute: "attrs.Attribute[Sequence[int]]", steps: Sequence[int]) -> None:
        if not isinstance(steps, Sequence) or not steps or any(not is_whole(count) or count < 1 for count in steps):
            raise ValueError(f"DrawnSteps.steps must hold numbers of steps of at least 1; got {steps!r}")

    def branching(self) -> Branching:
        """Branching of the largest number of steps, which needs the most memory."""
        return DeterministicSampler(max(self.steps), self.samples).branching()

    def outline(self, policy: Policy) -> Outline:
        """Outline of the smallest number of steps, with the grids of the others."""
        counts = sorted(set(self.steps))
        least, *others = (foreseen(policy.at(count), DeterministicSampler(count, self.samples).branching()) for count in counts)
        return attrs.evolve(least, others=tuple(other.sigmas for other in others))

    def drawn(self, streams: Streams) -> int:
        """Draw the number of steps of a training step."""
        return self.steps[int(streams.generator("steps").integers(len(self.steps)))]

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        for count in self.steps:  # check all numbers at the first step, not when each is drawn
            policy.at(count)
        steps = self.drawn(streams)
        view = policy.at(steps)
        if view is not policy:
            condition = _told(view, condition)
        return DeterministicSampler(steps, self.samples, self.rows).sample(view, condition, progress, streams)


def _told(view: Policy, condition: Condition) -> Condition:
    """Encode the same prompts, with the same ids, for a student of another number of steps."""
    told = attrs.evolve(view.encode(condition.prompts), ids=condition.ids)
    for row, prompt in enumerate(condition.prompts):
        if all(torch.equal(tensor[row], told.tensors[name][row]) for name, tensor in condition.tensors.items()):
            raise ValueError(
                f"DrawnSteps: a tag in the prompt must tell the policy the number of steps; {prompt!r} is encoded alike with the tag of "
                f"{view.step_counts[0]} steps and of another number. Its network reads no text, or cuts it before the tag: raise "
                "max_sequence_length."
            )
    return told
