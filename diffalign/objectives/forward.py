"""Shared code of losses on noised final samples: draws, errors under other weights, weights of units, micro-batches, old weights.

Legend: K samples, M noise levels of each, U = K M units; * latent dimensions.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Loss, Objective, Outline, Phase, Policy, Progress, ScoredBatch, micro_batched

from .draws import Draws
from .noised import Noised, NoisedSamples, mean_square
from .requirements import require_groups, require_several


@attrs.frozen(eq=False)
class ForwardBatch:
    """A scored batch with noise added to its samples for one update.

    The units of a sample stand together: unit u is noise level u % M of sample u // M, `sample[u]`, and M is `samples.levels`.

    Args:
        samples: the noised samples
        rows: units per network call; None takes all at once
    """

    samples: NoisedSamples
    rows: int | None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def batch(self) -> ScoredBatch:
        """Trajectories with their rewards."""
        return self.samples.batch

    @property
    def sample(self) -> Tensor:
        """Sample of each unit: [U]."""
        return self.samples.sample

    @property
    def group(self) -> Tensor:
        """Prompt group of each unit: [U]."""
        return self.batch.trajectories.group[self.sample]

    @property
    def size(self) -> Tensor:
        """Number of samples in the group of each unit: [U]."""
        return torch.bincount(self.batch.trajectories.group)[self.group]

    @property
    def weight(self) -> Tensor:
        """Weight 1 / (size M groups) of each unit: [U], float64. The weighted sum is a mean over levels, samples and prompts."""
        return 1 / (self.size.double() * self.samples.levels * self.batch.groups)

    @property
    def pieces(self) -> Sequence[Tensor]:
        """Indices of the units, on the host, split into pieces of one network call."""
        pieces: Sequence[Tensor] = torch.arange(len(self)).split(self.rows or len(self))
        return pieces

    @torch.no_grad()
    def under(self, policy: Policy, whose: str) -> tuple[Tensor, Tensor]:
        """Velocities [U, *] and errors [U] under some weights, with one network row per unit. Velocities take M times the samples' memory.

        Args:
            policy: the weights
            whose: name of the weights in error messages

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

    @torch.no_grad()
    def errors(self, policy: Policy, whose: str) -> Tensor:
        """Errors [U] under some weights, with one network row per unit. No velocity is kept.

        Args:
            policy: the weights
            whose: name of the weights in error messages

        Raises:
            NonFiniteError: an error is not finite.
        """
        error = torch.cat([noised.error(noised.velocity(policy)) for noised in map(self.samples.at, self.pieces)])
        self.samples.require_finite(error, torch.arange(len(self)), whose)
        return error

    def coupled(
        self,
        evaluate: Callable[[Noised, Tensor], Mapping[str, Tensor]],
        loss_of: Callable[[Mapping[str, Tensor]], Loss],
        units: Tensor | None = None,
    ) -> Iterator[Loss]:
        """Micro-batches of a loss that compares units with each other, see `micro_batched`.

        Args:
            evaluate: maps some noised units and their indices [B] to numbers by name, each [B]
            loss_of: maps the numbers of the chosen units, each [C] in the order of `units`, to the loss
            units: [C] indices of the units that the loss needs, such as those of the best and the worst sample of each prompt; None takes
                all
        """
        chosen = torch.arange(len(self)) if units is None else units.cpu()

        def at(places: Tensor) -> Mapping[str, Tensor]:
            return evaluate(self.samples.at(chosen[places]), chosen[places])

        return micro_batched(at, len(chosen), loss_of, self.rows)

    def apart(self, loss_of: Callable[[Noised, Tensor], Loss]) -> Iterator[Loss]:
        """Micro-batches of a loss that is a sum over units, so that one pass is enough.

        Args:
            loss_of: maps some noised units and their indices [B] to the loss
        """
        for units in self.pieces:
            yield loss_of(self.samples.at(units), units)

    def distance(self, reference: Policy, velocity: Tensor, noised: Noised, units: Tensor) -> Tensor:
        """Mean squared distance [B] of velocities to those of frozen weights, with the gradient of the former: the penalty of a KL.

        Args:
            reference: frozen
            velocity: [B, *] of the trained policy
            noised, units: the noised units and their indices [B]

        Raises:
            NonFiniteError: a distance is not finite.
        """
        with torch.no_grad():
            frozen = noised.velocity(reference)
        distance = mean_square(velocity - frozen)
        self.samples.require_finite(distance, units, "reference")
        return distance

    def reported(self, value: Tensor, units: int) -> tuple[Tensor, Tensor]:
        """Loss of some units as a metric: total and count of a mean over prompts."""
        prompts = len(self.batch.trajectories.condition)
        return value.detach() * self.batch.groups, torch.tensor(prompts * units / len(self))


@attrs.define(eq=False)
class ForwardLosses:
    """Draws noised samples for each update, and lets old weights follow the trained ones after each step.

    Args:
        policy: policy that is trained
        old: frozen fork that follows the policy; None if the loss needs none
        follower: moves `old`
        draws: noise levels and noises of an update
        name: name of the random draws
        objective: class of the objective in error messages
    """

    policy: Policy
    old: Policy | None
    follower: Follower
    draws: Draws
    name: str
    objective: str
    _progress: Progress | None = attrs.field(default=None, init=False, repr=False)
    """Progress of the present step, because `Objective.after_step` does not get it; None between steps."""

    def draw(self, batch: ScoredBatch, update: int, rows: int | None) -> ForwardBatch:
        """Add noise to the samples of a batch, for one of its updates.

        Args:
            batch: batch with the samples
            update: index of the update of this batch
            rows: units per network call; None takes all at once

        Raises:
            ValueError: a group has one sample, the decay is outside [0, 1], or the rollout's grid has too few levels.
        """
        require_groups(batch.trajectories, self.objective)
        self.follower.kept(batch.progress)  # refuses a wrong decay before any weight moves
        self._progress = batch.progress
        return ForwardBatch(self.draws(batch, f"{self.name}/{update}", self.objective), rows)

    def require(self, outline: Outline) -> None:
        """Refuse a sampler of one sample per prompt, or whose grid has too few levels: see `Objective.require`."""
        require_several(outline, self.objective)
        self.draws.require(outline, self.objective)

    def update_rows(self, samples: int) -> int:
        """Network rows of an update for one prompt, per policy: see `Objective.update_rows`."""
        return samples * self.draws.units

    def after_step(self) -> None:
        """Move the old weights, once all updates of a step are done."""
        progress, self._progress = self._progress, None
        if self.old is not None and progress is not None:
            self.follower.move(self.old, self.policy, progress)


class ForwardObjective(Objective):
    """Objective over noised ends that trains one policy. A subclass makes `_forward` and yields `losses`.

    Other weights belong into the fields `reference` and `old`, so that checkpoints hold them.
    """

    reference: Policy | None = None
    """Frozen weights to which the policy is held; None if the loss needs none. `require_frozen` refuses others."""

    old: Policy | None = None
    """Frozen weights that follow the policy; None if the loss needs none."""

    updates: int = 1
    """Inner updates on the same samples, each with new noise."""

    rows: int | None = None
    """Noised units of a micro-batch; None takes all at once."""

    _forward: ForwardLosses

    @abstractmethod
    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        """Micro-batches of an update of the policy."""

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self.losses, self.updates),)

    def policies(self) -> Mapping[str, Policy]:
        named = {"policy": self.policy, "reference": self.reference, "old": self.old}
        return {name: policy for name, policy in named.items() if policy is not None}

    def require(self, outline: Outline) -> None:
        self._forward.require(outline)

    def update_rows(self, samples: int, parents: int) -> int:
        return self._forward.update_rows(samples)

    def after_step(self) -> None:
        self._forward.after_step()
