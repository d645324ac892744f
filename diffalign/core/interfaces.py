"""What can be exchanged: samplers, rewards, objectives, sources of prompts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from .policy import Policy
from .processes import Devices
from .streams import Streams
from .types import Condition, Loss, Progress, Prompt, ScoredBatch, TrajectoryBatch


@attrs.frozen(eq=False)
class Outline:
    """What is known of the trajectories of a prompt before they are drawn.

    Args:
        samples: finished samples
        noise_levels: [T] eta of each denoising step, 0 = deterministic
        sigmas: [T+1] the noise grid, on the host
    """

    samples: int
    noise_levels: tuple[float, ...]
    sigmas: Tensor


class TrajectorySampler(ABC):
    """Draws a forest of denoising trajectories.

    A sampler that knows how its forest branches has a method `branching()` as well: `diffalign.samplers.Branches`, for forecasts.
    """

    def outline(self, policy: Policy) -> Outline | None:
        """What it will draw from a policy, as far as that is known before it does. Draws nothing.

        Args:
            policy: that rolls out

        Returns:
            None where nothing is known.

        Raises:
            ValueError: it cannot draw from this policy: the grid has no such number of steps, or the kernel no noise where it is planned.
        """
        return None

    @abstractmethod
    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        """Roll out: the same arguments give the same forest, whatever the batching. Called without gradients."""


class Reward(ABC):
    """Scores finished images. Any function of the same signature serves as well."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[K, 3, H, W] in [0, 1] and K prompts -> [K] finite numbers, larger is better. No gradient is taken."""


RewardFunction = Reward | Callable[[Tensor, Sequence[Prompt]], Tensor]


class Aggregation(ABC):
    """Turns the raw scores of several rewards into the one number that an objective sees.

    Args:
        weights: by reward name; None weighs each 1
    """

    weights: Mapping[str, float] | None = None

    def observe(self, parts: Mapping[str, Tensor], group: Tensor, devices: Devices) -> None:  # noqa: B027  a hook with a default
        """See the scores of a step, once, before they are aggregated; for running statistics, which must be equal on all processes."""

    @abstractmethod
    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        """Scores by reward name, each [K], and the group of each sample [K] -> [K]."""


@attrs.frozen(eq=False)
class Phase:
    """A stretch of training between two barriers: everything it trains steps once, at its end.

    Args:
        trains: role -> weights; roles name optimizers, metrics and checkpoint entries
        losses: (batch, update index) -> micro-batches, whose gradients add up
        repeats: inner updates on the same batch
    """

    trains: Mapping[str, Policy]
    losses: Callable[[ScoredBatch, int], Iterator[Loss]]
    repeats: int = attrs.field(default=1, validator=attrs.validators.ge(1))


class Objective(ABC):
    """Moves the weights: yields the losses of a step. Its constructor's parameter for the weights being aligned is called `policy`."""

    policy: Policy

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in order."""

    def behavior(self) -> Policy:
        """Who rolls out; the first-step contract replays this one."""
        return self.policy

    def policies(self) -> Mapping[str, Policy]:
        """Every policy whose state a checkpoint must hold, trained or not (an old policy, an average), by name."""
        return {role: policy for phase in self.phases() for role, policy in phase.trains.items()}

    def require(self, outline: Outline) -> None:  # noqa: B027  most samplers serve most objectives
        """Refuse a sampler whose trajectories it could not learn from. The loop asks when it is built, before anything is drawn.

        Args:
            outline: of what the sampler draws

        Raises:
            ValueError: what must hold, and what to take instead.
        """

    def update_rows(self, samples: int, parents: int) -> int | None:
        """Network rows that an update evaluates for one prompt, per policy; for forecasts. By default it replays stochastic edges.

        Args:
            samples: finished samples of a prompt
            parents: nodes of a prompt from which stochastic edges go out

        Returns:
            None where it is not known.
        """
        return parents or None

    def after_update(self, role: str) -> None:  # noqa: B027  a hook with a default
        """After each optimizer step of that role."""

    def after_step(self) -> None:  # noqa: B027
        """Once per loop step."""

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """See the metrics of a step, once, as they are over all processes; for what adapts to them.

        Returns:
            What the user should be told about the run; None where there is nothing to say. The loop prints it.
        """
        return None

    def state(self) -> Mapping[str, Any]:
        """State for checkpoints beside the weights of `policies()`: counters, running statistics; numbers, texts and tensors."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state()` gave."""


@runtime_checkable
class Stateful(Protocol):
    """A sampler, plan, aggregation or prompt source that is no pure function of the step: its state goes into checkpoints."""

    def state(self) -> Mapping[str, Any]:
        """Numbers, texts and tensors."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        ...


class PromptSource(Protocol):
    """Where prompts come from: a pure function of the step, so that resume needs no state."""

    def draw(self, step: int, count: int) -> Sequence[Prompt]:
        """The `count` prompts of a step."""
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A sampler or objective that evaluates at most `rows` network rows at once; None takes all. Results do not depend on it.

    Where it is a field of an attrs class, the loop halves it when memory runs out.
    """

    @property
    def rows(self) -> int | None:
        """The budget."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A prompt source that can say all its prompts, which are then checked and planned for before the run."""

    @property
    def prompts(self) -> Sequence[Prompt | str]:
        """All that it may draw."""
        ...


@runtime_checkable
class Planned(Protocol):
    """A sampler that follows a plan; the state of one that is `Stateful` goes into checkpoints."""

    @property
    def plan(self) -> object:
        """What it follows."""
        ...


OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
