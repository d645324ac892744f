"""Plans: at which steps a rollout is stochastic, and where it branches.

Legend: T steps; step t leads from sigmas[t] to sigmas[t + 1].
"""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import attrs

from diffalign.core import Progress, Streams


@attrs.frozen
class Branching:
    """Children and noise level of each step of a rollout.

    Args:
        children: [T] children of every node of the frontier at step t; 1 goes on without branching
        noise_levels: [T] eta of step t, 0 = deterministic
        roots: independent initial noises per prompt

    Raises:
        ValueError: a branching without noise (its children would be equal), a stochastic single-child step above the first branching
            of a single root (every leaf would share that edge, and a comparison within the group cannot see it).
    """

    children: tuple[int, ...]
    noise_levels: tuple[float, ...]
    roots: int = attrs.field(default=1, validator=attrs.validators.ge(1))

    def __attrs_post_init__(self) -> None:
        if len(self.children) != len(self.noise_levels):
            raise ValueError(f"Branching.noise_levels must have {len(self.children)} entries, one per step; got {len(self.noise_levels)}")
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
                f"Branching: step {shared} is stochastic above the first branching (step {first}); all leaves share that edge, so it can "
                "learn nothing. Make it deterministic, branch there, or use several roots."
            )

    @property
    def leaves(self) -> int:
        """Finished samples per prompt."""
        return self.widths[-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """[T+1] nodes of the frontier before each step, and the leaves."""
        widths = [self.roots]
        for children in self.children:
            widths.append(widths[-1] * children)
        return tuple(widths)

    @property
    def rollout_rows(self) -> int:
        """Network rows of a rollout, per prompt."""
        return sum(self.widths[:-1])

    @property
    def replay_rows(self) -> int:
        """Network rows of a replay, per prompt: one per parent of stochastic edges."""
        return sum(width for width, eta in zip(self.widths, self.noise_levels, strict=False) if eta > 0)


@runtime_checkable
class Branches(Protocol):
    """A sampler that knows before it runs how its forest branches, so that samples, rows and memory can be forecast."""

    def branching(self) -> Branching:
        """The branching of a step of the run; where steps differ, the one to have room for."""
        ...


class Plan(ABC):
    """Draws the branching of a step. A plan is a value: what it draws depends on its arguments alone."""

    @abstractmethod
    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        """The branching of this step of the run, for a rollout of `steps` denoising steps; equal on all processes.

        Raises:
            ValueError: the plan does not fit that many steps. Samplers call this once when they are built.
        """
