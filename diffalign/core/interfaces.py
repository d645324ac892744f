"""Interfaces of the parts that can be exchanged: samplers, rewards, objectives, sources of prompts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from .ledger import Ledger
from .policy import Policy
from .processes import Devices
from .scores import Partial, Scores
from .streams import Streams
from .types import Condition, Loss, Progress, Prompt, ScoredBatch, Size, TrajectoryBatch
from .update_rows import UpdateRows


@attrs.frozen(eq=False)
class Outline:
    """Properties of the trajectories of a prompt that are known before they are drawn.

    Where the steps of a run differ, the number of samples holds for all of them, and so does whether there is noise; noise levels and
    sigmas are those of one step.

    Args:
        samples: number of finished samples
        noise_levels: [T] eta of each denoising step, 0 = deterministic
        sigmas: [T+1] the noise grid, on the host
        others: noise grids of other steps of the run, each as `sigmas`
    """

    samples: int
    noise_levels: tuple[float, ...]
    sigmas: Tensor
    others: tuple[Tensor, ...] = ()

    @property
    def grids(self) -> tuple[Tensor, ...]:
        """All noise grids of the run, that of `sigmas` first."""
        return (self.sigmas, *self.others)

    @property
    def stages(self) -> int:
        """Number T of denoising steps."""
        return len(self.sigmas) - 1


class TrajectorySampler(ABC):
    """Draws a forest of denoising trajectories.

    A sampler that knows how its forest branches has a method `branching()` as well: `diffalign.samplers.Branches`, for forecasts.
    """

    def outline(self, policy: Policy) -> Outline | None:
        """Describe the trajectories that the sampler will draw from a policy, without drawing them.

        Args:
            policy: policy that rolls out

        Returns:
            Outline of a prompt's trajectories; None if it is not known before.

        Raises:
            ValueError: the sampler cannot draw from this policy: the grid has no such number of steps, or the kernel no noise at a
                stochastic step.
        """
        return None

    @abstractmethod
    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        """Roll out. The same arguments give the same forest, however the calls are batched. Called without gradients."""


class Reward(ABC):
    """Scores finished images. Any function of the same signature serves as well."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        """Score images [K, 3, H, W] in [0, 1] with their K prompts: [K] finite numbers, larger is better. No gradient is taken.

        A reward that does not apply to every image returns a `Partial`, which says to which it does.
        """


class GroupReward(Reward):
    """Scores all images of a prompt together: a rank, a judge that compares them.

    The loop and evaluations give it whole groups. It stands among the rewards of a run under its own name, not inside another reward.
    """

    @abstractmethod
    def of_groups(self, images: Tensor, prompts: Sequence[Prompt], group: Tensor) -> Tensor | Partial:
        """Score images [K, 3, H, W] in [0, 1] with their K prompts and their groups [K], each group whole: [K], as a reward."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        """Score images where nothing is said of groups: those of equal prompts are one group."""
        place = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(str, prompts)))}
        return self.of_groups(images, prompts, torch.tensor([place[str(prompt)] for prompt in prompts], device=images.device))


class StepReward(Reward):
    """Scores the images of a training step, and is told which step it is: feedback that is given while a run trains.

    The loop gives it all images of a step at once, however many prompts a `Rollout` samples at once; anywhere else, in an evaluation for
    instance, `__call__` scores. It stands among the rewards of a run under its own name, not inside another reward.

    Attributes:
        whole: whether it needs all images of the step at once; one that needs the step alone says False, and is given them in pieces
    """

    whole: ClassVar[bool] = True

    @abstractmethod
    def of_step(self, images: Tensor, prompts: Sequence[Prompt], group: Tensor, progress: Progress) -> Tensor | Partial:
        """Score images [K, 3, H, W] in [0, 1] of a step with their K prompts and their groups [K]: [K], as a reward."""


RewardFunction = Reward | Callable[[Tensor, Sequence[Prompt]], Tensor | Partial]


class Aggregation(ABC):
    """Turns the raw scores of several rewards into the one number that an objective sees.

    Args:
        weights: by reward name; None weighs each 1. A reward without a weight, or with weight 0, is only logged: a sample to which no other
            applies counts as not scored. A class whose constructor takes them declares them again, as a field of attrs:
            `weights: Mapping[str, float] | None = None`
    """

    weights: Mapping[str, float] | None = None

    def observe(self, parts: Mapping[str, Tensor], group: Tensor, devices: Devices) -> None:  # noqa: B027  a hook with a default
        """Look at the scores of a step once, before they are aggregated. Running statistics made here must be equal on all processes."""

    @abstractmethod
    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        """Aggregate scores by reward name, each [K], with the group of each sample [K], to one number per sample [K].

        The loop gives `Scores`: `parts[name]` is refused where a reward does not apply to all, `parts.partial(name)` says to which.
        """

    def batch(
        self, trajectories: TrajectoryBatch, rewards: Tensor, parts: Scores, groups: int, progress: Progress, streams: Streams
    ) -> ScoredBatch:
        """Make the batch of a step of the rewards that this aggregation gave; the arguments are those of `ScoredBatch`.

        Raises:
            ValueError: the rewards are not one floating-point number per sample. Whether they are finite is seen where they are next read.
        """
        given: Any = rewards
        name, shape = type(self).__name__, tuple(trajectories.group.shape)
        if not isinstance(given, Tensor) or given.shape != shape or not given.is_floating_point():
            is_tensor = isinstance(given, Tensor)
            what = f"a tensor of shape {tuple(given.shape)}, {given.dtype}" if is_tensor else type(given).__name__
            raise ValueError(
                f"the aggregation {name} must return one number per sample, a floating-point tensor of shape {shape}, as its scores are; "
                f"it returned {what}"
            )
        return ScoredBatch(trajectories, rewards, parts, groups, progress, streams, weights=self.weights, aggregation=name)


@attrs.frozen(eq=False)
class Phase:
    """Part of a step that ends with one optimizer step of everything it trains.

    Args:
        trains: role -> weights; roles name optimizers, metrics and checkpoint entries
        losses: (batch, update index) -> micro-batches, whose gradients add up
        repeats: inner updates on the same batch

    Raises:
        ValueError: `trains` is no table of policies, or `losses` no function.
    """

    trains: Mapping[str, Policy]
    losses: Callable[[ScoredBatch, int], Iterator[Loss]]
    repeats: int = attrs.field(default=1, validator=attrs.validators.ge(1))

    def __attrs_post_init__(self) -> None:
        trains: Any = self.trains
        if not isinstance(trains, Mapping) or not all(isinstance(policy, Policy) for policy in trains.values()):
            raise ValueError(f'Phase.trains must be a dict of role -> Policy, such as {{"policy": self.policy}}; got {trains!r}'[:400])
        if not callable(self.losses):
            raise ValueError(
                f"Phase.losses must be a function of (batch, update) that yields Loss objects, such as `self.losses` without brackets; got "
                f"{type(self.losses).__name__}"
            )


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

    def require(self, outline: Outline) -> None:  # noqa: B027  most samplers serve most objectives
        """Refuse a sampler from whose trajectories the objective cannot learn. The loop calls this when it is built, before the first draw.

        Args:
            outline: properties of the trajectories that the sampler draws

        Raises:
            ValueError: the sampler does not fit; the message says what must hold and what to take instead.
        """

    def update_rows(self, samples: int, parents: int) -> int | None:
        """Network rows that an update evaluates for one prompt, per policy. Forecasts use it. The default replays each stochastic edge.

        Args:
            samples: finished samples of a prompt
            parents: nodes of a prompt from which stochastic edges go out

        Returns:
            The number of rows; None if it is not known.
        """
        return parents or None

    def step_rows(self, outline: Outline) -> UpdateRows | None:
        """Network rows of all updates of a step, where they are more than `update_rows` of one policy and of a reference.

        Forecasts use it. An objective whose rows vary gives their mean, of a step in which nothing rests.

        Args:
            outline: properties of the trajectories of a prompt

        Returns:
            The rows; None, the default, if `update_rows` says enough.
        """
        return None

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

    If `rows` is a field of an attrs class, the loop halves it when memory runs out, and on a GPU None is filled. So an objective reads its
    own `rows` at each call, and passes it on instead of giving copies to its parts.
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
class Sourced(Protocol):
    """Prompt source made of several, each with its own rewards; every prompt says its `source`."""

    @property
    def rewarded(self) -> Mapping[str, Sequence[str] | None]:
        """Name of a source -> names of the rewards that score its images; None stands for all rewards of the run."""
        ...


@runtime_checkable
class Demanding(Protocol):
    """Reward that needs more of a prompt than its text (metadata, a text in quotes), or a part that holds such rewards."""

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be scored.

        Raises:
            ConfigError: a prompt lacks something; the message names the first such prompt and what it lacks.
        """
        ...


@runtime_checkable
class Served(Protocol):
    """Reward that asks a server for its scores, or a part that holds such rewards."""

    def reach(self) -> None:
        """Refuse a server that is not there. Nothing is scored.

        Raises:
            ConfigError: names it, and what happened.
        """
        ...


@runtime_checkable
class Attended(Protocol):
    """Reward that must know when a run begins and ends, because it has a page or a file open for instance."""

    def hook(self) -> Any:
        """Give the `Hook` that is called for the reward. It starts before the hooks of the run, and comes after them at each step."""
        ...


@runtime_checkable
class Planned(Protocol):
    """Sampler that follows a plan. If the plan is `Stateful`, its state goes into checkpoints."""

    @property
    def plan(self) -> object:
        """Plan that the sampler follows."""
        ...


@runtime_checkable
class KeepsGraph(Protocol):
    """Sampler that can keep the graph of its stochastic steps until the first update goes back through it."""

    keep_graph: bool


class Meter(Protocol):
    """Computes metrics from the ledger of a step."""

    def read(self, ledger: Ledger, trained: Collection[str], size: Size | None) -> Mapping[str, tuple[float, float]]:
        """Compute the part of one process.

        Args:
            ledger: seconds, rows and calls of the step in this process
            trained: roles of the ledger whose weights are trained
            size: image size that the prompts of the step ask for; None is the policy's own

        Returns:
            Metric name -> (numerator, denominator). Both are summed over the processes, then divided.
        """
        ...


OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
