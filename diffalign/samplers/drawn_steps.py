"""Deterministic trajectories of a number of steps that is drawn anew at each training step."""

from collections.abc import Sequence

import attrs
import torch

from diffalign.core import Condition, Outline, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler

from .deterministic import DeterministicSampler
from .frontier import foreseen
from .plans import Branching


@attrs.frozen
class DrawnSteps(TrajectorySampler):
    """Draws a number of steps, then deterministic trajectories of that many: for a student of several, `TDMPolicy(..., also=[1, 2])`.

    One number for all prompts of a training step, uniform among `steps`, and a function of the run's seed and the training step alone:
    equal in all processes and after a resume. Prompts are encoded anew under the number that was drawn, so the batch says which it is.
    A policy that takes any number of steps is sampled on its own grid.

    Args:
        steps: the numbers of steps to draw from; twice the same makes it twice as likely
        samples: K trajectories per prompt
        rows: network rows per call; None takes all at once

    Raises:
        ValueError: numbers below 1, or none; a number that the student does not serve; a prompt that is encoded alike under two numbers,
            because the network reads no text, or not to its end.
    """

    steps: Sequence[int] = attrs.field(default=(1, 2, 4))
    samples: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))

    @steps.validator
    def _counts(self, attribute: "attrs.Attribute[Sequence[int]]", steps: Sequence[int]) -> None:
        if not steps or any(type(count) is not int or count < 1 for count in steps):
            raise ValueError(f"DrawnSteps.steps must hold numbers of steps of at least 1; got {list(steps)}")

    def branching(self) -> Branching:
        """Branching of the largest number of steps: a run must have room for it."""
        return DeterministicSampler(max(self.steps), self.samples).branching()

    def outline(self, policy: Policy) -> Outline:
        """Outline of the smallest number of steps: what fits it fits the others."""
        count = min(self.steps)
        return foreseen(policy.at(count), DeterministicSampler(count, self.samples).branching())

    def drawn(self, streams: Streams) -> int:
        """The number of steps of a training step."""
        return self.steps[int(streams.generator("steps").integers(len(self.steps)))]

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        for count in self.steps:  # at once, not when it is drawn
            policy.at(count)
        steps = self.drawn(streams)
        view = policy.at(steps)
        if view is not policy:
            condition = _told(view, condition)
        return DeterministicSampler(steps, self.samples, self.rows).sample(view, condition, progress, streams)


def _told(view: Policy, condition: Condition) -> Condition:
    """The same prompts with the same ids, as a student of another number of steps is told them."""
    told = attrs.evolve(view.encode(condition.prompts), ids=condition.ids)
    for row, prompt in enumerate(condition.prompts):
        if all(torch.equal(tensor[row], told.tensors[name][row]) for name, tensor in condition.tensors.items()):
            raise ValueError(
                f"DrawnSteps: the policy must be told how many steps there are, by its prompt; {prompt!r} is encoded alike with the tag "
                f"of {view.step_counts[0]} steps and of another number. Its network reads no text, or cuts it before the tag: raise "
                "max_sequence_length."
            )
    return told
