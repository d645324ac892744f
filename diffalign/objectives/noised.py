"""Finished samples with noise added again, for losses on the forward process.

Legend: K samples, M noise levels of each, U = K M units; unit u is noise level u % M of sample u // M. s is the last sigma of the rollout,
at which its samples lie: 0, or a little above where a UNet knows no lower level.
"""

from typing import Self

import attrs
import torch
from torch import Tensor

from diffalign.core import Condition, NonFiniteError, Policy, ScoredBatch, TrajectoryBatch
from diffalign.core.transition import expand

from .noising import bridge

_PER_SAMPLE = 1 << 32
"""Factor in the node ids of noise: sample * 2^32 + place of the level. So ids do not depend on the other prompts."""


@attrs.frozen(eq=False)
class Noised:
    """Noised units, by the kernel from s to sigma, x_sigma = a x_s + b e; s = 0 gives x_sigma = (1 - sigma) x_0 + sigma e.

    A loss function of `ForwardBatch.apart` and `coupled` is given some units so, with their indices: unit u is noise level u % M of sample
    u // M.

    Args:
        latents: [B, *] x_sigma
        sigma: [B]
        condition: B rows
        target: [B, *] derivative of x_sigma by sigma, e - x_0 at s = 0 (`bridge_velocity`); float32 or better
    """

    latents: Tensor
    sigma: Tensor
    condition: Condition
    target: Tensor

    def velocity(self, policy: Policy) -> Tensor:
        """Velocity under some weights, with one network row per unit: [B, *]."""
        return policy.velocity(self.latents, self.sigma, self.condition)

    def error(self, velocity: Tensor) -> Tensor:
        """Mean squared error of a velocity [B, *]: [B], float64."""
        return mean_square(velocity - self.target)


@attrs.frozen(eq=False)
class NoisedSamples:
    """Finished samples with M noise levels each. The noise is drawn when it is used. Unit u is noise level u % M of sample u // M.

    Draws depend only on the step, the prompt's id and the place of the sample among those of its prompt.

    Args:
        batch: batch with the samples
        sigma: [K, M] noise levels, all above s
        place: [K] place of each sample among those of its prompt
        shared: whether all samples of a prompt have the same levels and noise
        name: name of the draws
        antithetic: whether levels 2 j and 2 j + 1 of a sample have the noises e and -e
    """

    batch: ScoredBatch
    sigma: Tensor
    place: Tensor
    shared: bool
    name: str
    antithetic: bool = False

    @classmethod
    def draw(cls, batch: ScoredBatch, levels: int, sigma_min: float, shared: bool, name: str, objective: str) -> Self:
        """Choose the noise levels from the rollout's grid, without replacement.

        Args:
            batch: batch with the samples
            levels: number M of noise levels of each sample
            sigma_min: least sigma
            shared: see above
            name: name of the draws
            objective: name of the objective in messages

        Raises:
            ValueError: fewer than M levels of the grid are at least `sigma_min`.
        """
        trajectories = batch.trajectories
        grid = require_levels(trajectories.sigmas[:-1], levels, sigma_min, objective)
        place = places(trajectories)
        chosen = [
            batch.streams.generator(f"{name}/levels", prompt, 0 if shared else sample).choice(len(grid), levels, replace=False).tolist()
            for prompt, sample in zip(prompts(trajectories), place.tolist(), strict=True)
        ]
        return cls(batch, grid[torch.tensor(chosen, device=grid.device)], place, shared, name)

    def __len__(self) -> int:
        return self.sigma.numel()

    @property
    def levels(self) -> int:
        """Number M of noise levels of each sample."""
        return self.sigma.shape[1]

    @property
    def sample(self) -> Tensor:
        """Sample of each unit: [U]."""
        return torch.arange(len(self), device=self.sigma.device) // self.levels

    def at(self, units: Tensor) -> Noised:
        """Add noise to the units [B], chosen by index.

        Raises:
            ValueError: a level is not above the last of the rollout.
        """
        trajectories, streams = self.batch.trajectories, self.batch.streams
        units = units.to(self.sigma.device)
        sample, level = units // self.levels, units % self.levels
        stored, prompt = trajectories.samples[sample], trajectories.group[sample]
        clean = stored.to(torch.promote_types(stored.dtype, torch.float32))
        ids = trajectories.condition.ids[prompt.to(trajectories.condition.ids.device)].tolist()
        draw = level // 2 if self.antithetic else level
        node = draw if self.shared else self.place[sample] * _PER_SAMPLE + draw
        noise = streams.normals(clean.shape[1:], f"{self.name}/noise", ids, node.tolist()).to(clean)
        if self.antithetic:
            noise = noise * expand(1 - 2 * (level % 2), noise)
        sigma = self.sigma[sample, level]
        latents, target = bridge(clean, trajectories.sigmas[-1].to(clean).expand(len(units)), sigma.to(clean), noise)
        return Noised(latents.to(stored.dtype), sigma, trajectories.condition.select(prompt), target)

    def require_finite(self, values: Tensor, units: Tensor, whose: str) -> None:
        """Refuse numbers that are not finite.

        Args:
            values: [B] numbers of the units [B]
            whose: name of the weights in the message

        Raises:
            NonFiniteError: a number is not finite; the message names sigma and prompt.
        """
        bad = (~values.detach().isfinite()).nonzero().squeeze(1)
        if len(bad):
            unit = int(units[bad[0]])
            trajectories = self.batch.trajectories
            prompt = str(trajectories.condition.prompts[int(trajectories.group[unit // self.levels])])
            raise NonFiniteError(
                f"the velocity of the {whose} is not finite at sigma {self.sigma.flatten()[unit].item():.4g}, prompt {prompt!r}. "
                "Nothing was updated."
            )


def places(trajectories: TrajectoryBatch) -> Tensor:
    """Place of each sample among those of its prompt: [K]."""
    group = trajectories.group
    place = torch.zeros_like(group)
    for index in range(len(trajectories.condition)):
        mine = group == index
        place[mine] = torch.arange(int(mine.sum()), device=group.device)
    return place


def prompts(trajectories: TrajectoryBatch) -> list[int]:
    """Global id of the prompt of each sample, K of them."""
    ids = trajectories.condition.ids
    found: list[int] = ids[trajectories.group.to(ids.device)].tolist()
    return found


def require_levels(grid: Tensor, levels: int, sigma_min: float, objective: str) -> Tensor:
    """Noise levels [n] of a rollout that are at least `sigma_min`, if there are as many as are to be drawn.

    Raises:
        ValueError: there are fewer.
    """
    high = grid[grid >= sigma_min]
    if len(high) < levels:
        raise ValueError(
            f"{objective}.levels must be at most the number of noise levels of the rollout from sigma_min {sigma_min:g} on, "
            f"{len(high)}; got {levels}. Take fewer levels, a lower sigma_min, or more denoising steps."
        )
    return high


def mean_square(values: Tensor) -> Tensor:
    """Mean of the squares of each row: [B, *] -> [B], float64."""
    flat = values.flatten(1)
    return flat.square().sum(dim=1, dtype=torch.float64) / flat.shape[1]
