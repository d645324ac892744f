"""Interfaces of the parts that can be exchanged: samplers, rewards, objectives, sources of prompts."""

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


class TrajectorySampler(ABC):
    """Draws a forest of denoising trajectories."""

    @abstractmethod
    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        """Roll out. The same arguments give the same forest, however the calls are batched. Called without gradients."""


class Reward(ABC):
    """Scores finished images. Any function of the same signature serves as well."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images [K, 3, H, W] in [0, 1] with their K prompts: [K] finite numbers, larger is better. No gradient is taken."""


RewardFunction = Reward | Callable[[Tensor, Sequence[Prompt]], Tensor]


class Aggregation(ABC):
    """Turns the raw scores of several rewards into the one number that an objective sees.

    Args:
        weights: by reward name; None weighs each 1
    """

    weights: Mapping[str, float] | None = None

    def observe(self, parts: Mapping[str, Tensor], group: Tensor, devices: Devices) -> None:  # noqa: B027  a hook with a default
        """Look at the scores of a step once, before they are aggregated. Running statistics made here must be equal on all processes."""

    @abstractmethod
    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        """Aggregate scores by reward name, each [K], with the group of each sample [K], to one number per sample [K]."""


@attrs.frozen(eq=False)
class Phase:
    """Part of a step that ends with one optimizer step of everything it trains.

    Args:
        trains: role -> weights; roles name optimizers, metrics and checkpoint entries
        losses: (batch, update index) -> micro-batches, whose gradients add up
        repeats: inner updates on the same batch
    """

    trains: Mapping[str, Policy]
    losses: Callable[[ScoredBatch, int], Iterator[Loss]]
    repeats: int = attrs.field(default=1, validator=attrs.validators.ge(1))


class Objective(ABC):
    """Yields the losses of a step, which move the weights. The constructor's parameter for the aligned weights is called `policy`."""

    policy: Policy

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """List the phases of a step, in order."""

    def behavior(self) -> Policy:
        """Policy that rolls out; the first-step contract replays it."""
        return self.policy

    def policies(self) -> Mapping[str, Policy]:
        """Every policy whose state a checkpoint must hold, trained or not (an old policy, an average), by name."""
        return {role: policy for phase in self.phases() for role, policy in phase.trains.items()}

    def update_rows(self, samples: int, parents: int) -> int | None:
        """Network rows that an update evaluates for one prompt, per policy. Forecasts use it. The default replays each stochastic edge.

        Args:
            samples: finished samples of a prompt
            parents: nodes of a prompt from which stochastic edges go out

        Returns:
            The number of rows; None if it is not known.
        """
        return parents or None

    def after_update(self, role: str) -> None:  # noqa: B027  a hook with a default
        """Act after each optimizer step of a role."""

    def after_step(self) -> None:  # noqa: B027
        """Act once at the end of each loop step."""

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Look at the metrics of a step once, taken over all processes, to adapt to them.

        Returns:
            A message for the user, which the loop prints; None if there is nothing to say.
        """
        return None

    def state(self) -> Mapping[str, Any]:
        """State that checkpoints hold beside the weights of `policies()`: counters and statistics, as numbers, texts and tensors."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state()` gave."""


@runtime_checkable
class Stateful(Protocol):
    """Sampler, plan, aggregation or prompt source that depends on earlier steps. Its state goes into checkpoints."""

    def state(self) -> Mapping[str, Any]:
        """Numbers, texts and tensors."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        ...


class PromptSource(Protocol):
    """Source of prompts: a pure function of the step, so that resume needs no state."""

    def draw(self, step: int, count: int) -> Sequence[Prompt]:
        """Draw the `count` prompts of a step."""
        ...


@runtime_checkable
class Budgeted(Protocol):
    """Sampler or objective that evaluates at most `rows` network rows at once; None means all. Results do not depend on `rows`.

    If `rows` is a field of an attrs class, the loop halves it when memory runs out. So an objective reads its own `rows` at each call, and
    passes it on instead of giving copies to its parts.
    """

    @property
    def rows(self) -> int | None:
        """Largest number of rows of a network call."""
        ...


@runtime_checkable
class Listed(Protocol):
    """Prompt source that can list all its prompts, so that they are checked and counted before the run."""

    @property
    def prompts(self) -> Sequence[Prompt | str]:
        """All prompts that it may draw."""
        ...


@runtime_checkable
class Planned(Protocol):
    """Sampler that follows a plan. If the plan is `Stateful`, its state goes into checkpoints."""

    @property
    def plan(self) -> object:
        """Plan that the sampler follows."""
        ...


OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
