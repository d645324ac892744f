"""What losses on noised final samples share: draws, errors under other weights, weights of units, micro-batches, and old weights.

Legend: K samples, M noise levels of each, U = K M units; * latent dimensions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Loss, Outline, Policy, Progress, ScoredBatch, micro_batched

from .noised import Noised, NoisedSamples, require_levels
from .requirements import require_groups, require_several


@attrs.frozen(eq=False)
class ForwardBatch:
    """A scored batch with noise added to its samples for one update.

    Args:
        samples: the draws
        rows: units per network call; None takes all at once
    """

    samples: NoisedSamples
    rows: int | None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def batch(self) -> ScoredBatch:
        """Trajectories and rewards."""
        return self.samples.batch

    @property
    def sample(self) -> Tensor:
        """[U] the sample of each unit."""
        return self.samples.sample

    @property
    def group(self) -> Tensor:
        """[U] the prompt group of each unit."""
        return self.batch.trajectories.group[self.sample]

    @property
    def size(self) -> Tensor:
        """[U] samples in the group of each unit."""
        return torch.bincount(self.batch.trajectories.group)[self.group]

    @property
    def weight(self) -> Tensor:
        """[U] 1 / (size M groups), float64: the weighted sum is the mean over levels, the samples of a prompt, and all prompts."""
        return 1 / (self.size.double() * self.samples.levels * self.batch.groups)

    @property
    def pieces(self) -> Sequence[Tensor]:
        """The units, on the host, as many at a time as one network call takes."""
        pieces: Sequence[Tensor] = torch.arange(len(self)).split(self.rows or len(self))
        return pieces

    @torch.no_grad()
    def under(self, policy: Policy, whose: str) -> tuple[Tensor, Tensor]:
        """Velocities [U, *], not larger than a stored level of the rollout, and errors [U] under some weights, one network row a unit.

        Args:
            policy: the weights
            whose: they are, for messages

        Raises:
            NonFiniteError: an error is not finite.
        """
        velocities, errors = [], []
        for units in self.pieces:
            noised = self.samples.at(units)
            velocities.append(noised.velocity(policy))
            errors.append(noised.error(velocities[-1]))
        error = torch.cat(errors)
        self.samples.require_finite(error, torch.arange(len(self)), whose)
        return torch.cat(velocities), error

    def coupled(
        self, evaluate: Callable[[Noised, Tensor], Mapping[str, Tensor]], loss_of: Callable[[Mapping[str, Tensor]], Loss]
    ) -> Iterator[Loss]:
        """Micro-batches of a loss that compares units with each other, see `micro_batched`.

        Args:
            evaluate: some units, noised, and their indices [B] -> numbers by name, each [B]
            loss_of: the numbers of all units, each [U] -> loss
        """
        return micro_batched(lambda units: evaluate(self.samples.at(units), units), len(self), loss_of, self.rows)

    def apart(self, loss_of: Callable[[Noised, Tensor], Loss]) -> Iterator[Loss]:
        """Micro-batches of a loss that is a sum over units: they need no first pass.

        Args:
            loss_of: some units, noised, and their indices [B] -> loss
        """
        for units in self.pieces:
            yield loss_of(self.samples.at(units), units)

    def reported(self, value: Tensor, units: int) -> tuple[Tensor, Tensor]:
        """The loss of some units as a metric, a mean over prompts: total and count."""
        prompts = len(self.batch.trajectories.condition)
        return value.detach() * self.batch.groups, torch.tensor(prompts * units / len(self))


@attrs.define(eq=False)
class ForwardLosses:
    """Draws noised samples for each update, and lets old weights follow the trained ones after each step.

    Args:
        policy: whose gradient is taken
        old: a frozen fork that follows it; None where the loss reads none
        follower: how
        levels: M
        sigma_min: least noise level
        shared: whether all samples of a prompt have the same levels and noise
        rows: units per network call; None takes all at once
        name: of the draws
        objective: its class, for messages
    """

    policy: Policy
    old: Policy | None
    follower: Follower
    levels: int
    sigma_min: float
    shared: bool
    rows: int | None
    name: str
    objective: str
    _progress: Progress | None = attrs.field(default=None, init=False, repr=False)
    """Of the step under way, which `Objective.after_step` is not told; None between steps."""

    def draw(self, batch: ScoredBatch, update: int) -> ForwardBatch:
        """Add noise to the samples of a batch, for one of its updates.

        Raises:
            ValueError: a group of one sample, a decay outside [0, 1], fewer than M levels from `sigma_min` on.
        """
        require_groups(batch.trajectories, self.objective)
        self.follower.kept(batch.progress)  # a decay that cannot be is refused before a weight moves
        self._progress = batch.progress
        samples = NoisedSamples.draw(batch, self.levels, self.sigma_min, self.shared, f"{self.name}/{update}", self.objective)
        return ForwardBatch(samples, self.rows)

    def require(self, outline: Outline) -> None:
        """Refuse a sampler of one sample per prompt, or of fewer than M levels from `sigma_min` on: see `Objective.require`."""
        require_several(outline, self.objective)
        require_levels(outline.sigmas[:-1], self.levels, self.sigma_min, self.objective)

    def update_rows(self, samples: int) -> int:
        """Network rows of an update for one prompt, per policy: see `Objective.update_rows`."""
        return samples * self.levels

    def after_step(self) -> None:
        """Let the old weights follow, once all updates of a step are done."""
        progress, self._progress = self._progress, None
        if self.old is not None and progress is not None:
            self.follower.move(self.old, self.policy, progress)
