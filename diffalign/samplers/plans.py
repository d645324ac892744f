"""Plans: the steps at which a rollout is stochastic, and those at which it branches.

Legend: T steps; step t leads from sigmas[t] to sigmas[t + 1].
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import attrs

from diffalign.core import Progress, Streams


@attrs.frozen
class Branching:
    """Children and noise level of each step of a rollout.

    Args:
        children: [T] number of children of every node of the frontier at step t; 1 means no branching
        noise_levels: [T] eta of step t, 0 = deterministic
        roots: independent initial noises per prompt
        evaluations: [T] network evaluations of every node of the frontier at step t; None takes one

    Raises:
        ValueError: entries are missing; a step branches without noise, so that its children would be equal; or a stochastic step with one
            child comes before the first branching of a single root. All leaves would share that edge, so a comparison within the group
            teaches it nothing.
    """

    children: tuple[int, ...]
    noise_levels: tuple[float, ...]
    roots: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    evaluations: tuple[int, ...] | None = None

    def __attrs_post_init__(self) -> None:
        if len(self.children) != len(self.noise_levels):
            raise ValueError(f"Branching.noise_levels must have {len(self.children)} entries, one per step; got {len(self.noise_levels)}")
        if self.evaluations is not None and (len(self.evaluations) != len(self.children) or min(self.evaluations) < 1):
            raise ValueError(f"Branching.evaluations must have {len(self.children)} entries of at least 1; got {self.evaluations}")
        for step, (children, eta) in enumerate(zip(self.children, self.noise_levels, strict=True)):
            if children < 1 or eta < 0:
                raise ValueError(f"Branching: step {step} has {children} children and eta {eta:g}; they must be at least 1 and 0")
            if children > 1 and eta == 0:
                raise ValueError(
                    f"Branching: step {step} branches {children}-fold without noise, so its children are equal; give it eta > 0"
                )
        first = next((step for step, children in enumerate(self.children) if children > 1), None)
        if self.roots == 1 and first is not None and any(self.noise_levels[:first]):
            shared = next(step for step in range(first) if self.noise_levels[step])
            raise ValueError(
                f"Branching: step {shared} is stochastic before the first branching (step {first}); all leaves share that edge, so a "
                "comparison between them teaches it nothing. Make it deterministic, branch there, or use several roots."
            )

    @property
    def leaves(self) -> int:
        """Number of finished samples per prompt."""
        return self.widths[-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of nodes in the frontier before each step, then the number of leaves: [T+1]."""
        widths = [self.roots]
        for children in self.children:
            widths.append(widths[-1] * children)
        return tuple(widths)

    @property
    def evaluated(self) -> tuple[int, ...]:
        """Network rows of each evaluation of a rollout, one after the other, per prompt; [T] if each step takes one."""
        counts = self.evaluations or (1,) * len(self.children)
        return tuple(width for width, count in zip(self.widths, counts, strict=False) for _ in range(count))

    @property
    def rollout_rows(self) -> int:
        """Network rows of a rollout, per prompt."""
        return sum(self.evaluated)

    @property
    def replay_rows(self) -> int:
        """Network rows of a replay, per prompt: one for each node from which stochastic edges go out."""
        return sum(width for width, eta in zip(self.widths, self.noise_levels, strict=False) if eta > 0)


@runtime_checkable
class Branches(Protocol):
    """Sampler that knows the branching of its forest before it runs, so that samples, rows and memory can be forecast."""

    def branching(self) -> Branching:
        """Branching of a step of the run; if steps differ, the one that needs the most memory."""
        ...


class Plan(ABC):
    """Draws the branching of a step. A draw depends only on the arguments and the fields of the plan."""

    @abstractmethod
    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        """Draw the branching of this step of the run, for a rollout of `steps` denoising steps. It is equal in all processes.

        Raises:
            ValueError: the plan does not fit that many steps. Samplers call this once when they are built.
        """

    def largest(self, steps: int) -> Branching:
        """Branching that needs at least the memory of any draw of the run, for forecasts: the earlier a split, the more rows follow it.

        Without another word it is that of the first draw, which is right for a plan that never changes.
        """
        return drawn(self, steps, Progress(0, 1), Streams(0))

    def largest_noise(self, steps: int) -> tuple[float, ...]:
        """Largest eta that any draw of the run may give to each of `steps` denoising steps, so that a policy can refuse it beforehand: [T].

        Without another word it is that of the first draw, which is right for a plan that never changes.
        """
        return drawn(self, steps, Progress(0, 1), Streams(0)).noise_levels


def drawn(plan: Plan, steps: int, progress: Progress, streams: Streams) -> Branching:
    """Draw the branching of a step of the run, and require that it has `steps` denoising steps.

    Raises:
        ValueError: the plan gave no `Branching`, or one of another length.
    """
    return _fitting(plan.draw(steps, progress, streams), steps, f"{type(plan).__name__}.draw", f"at step {progress.step} of the run it")


def largest(plan: Plan, steps: int) -> Branching:
    """Read the branching that needs the most memory from a plan, and require that it has `steps` denoising steps.

    Raises:
        ValueError: the plan gave no `Branching`, or one of another length.
    """
    return _fitting(plan.largest(steps), steps, f"{type(plan).__name__}.largest", "it")


def _fitting(branching: Any, steps: int, where: str, when: str) -> Branching:
    what = f"a Branching of {steps} denoising steps"
    if not isinstance(branching, Branching):
        raise ValueError(f"{where} must return {what}; {when} returned {type(branching).__name__}")
    if len(branching.children) != steps:
        raise ValueError(
            f"{where} must return {what}, as its argument `steps` says; {when} returned one of {len(branching.children)}. Give every step "
            "an entry: 1 child and eta 0 where nothing is to happen."
        )
    return branching


def noise_bound(plan: Plan, steps: int) -> tuple[float, ...]:
    """Read the largest eta of each of `steps` denoising steps from a plan: [T].

    Raises:
        ValueError: their number is another.
    """
    bound = plan.largest_noise(steps)
    if len(bound) != steps:
        raise ValueError(f"{type(plan).__name__}.largest_noise must return {steps} etas, one per denoising step; it returned {len(bound)}")
    return bound
