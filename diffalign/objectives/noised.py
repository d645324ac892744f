"""Finished samples with noise added again: what losses on the forward process look at.

Legend: K samples, M noise levels of each, U = K M units; unit u is noise level u % M of sample u // M.
"""

from typing import Self

import attrs
import torch
from torch import Tensor

from diffalign.core import Condition, NonFiniteError, Policy, ScoredBatch

_PER_SAMPLE = 1 << 32
"""Node ids of noise are sample * 2^32 + place of the level: they do not depend on the other prompts."""


@attrs.frozen(eq=False)
class Noised:
    """Some units.

    Args:
        latents: [B, *] x_sigma = (1 - sigma) x_0 + sigma e
        sigma: [B]
        condition: B rows
        target: [B, *] e - x_0, float32 or better
    """

    latents: Tensor
    sigma: Tensor
    condition: Condition
    target: Tensor

    def velocity(self, policy: Policy) -> Tensor:
        """The velocity [B, *] under some weights: one network row a unit."""
        return policy.velocity(self.latents, self.sigma, self.condition)

    def error(self, velocity: Tensor) -> Tensor:
        """The mean squared error of a velocity [B, *]: [B], float64."""
        return mean_square(velocity - self.target)


@attrs.frozen(eq=False)
class NoisedSamples:
    """M noise levels of each finished sample, drawn without replacement from the grid of the rollout; noise is drawn when it is used.

    Draws depend on the step, the prompt's id and the sample's place among its prompt's, and on nothing else.

    Args:
        batch: whose samples
        sigma: [K, M]
        place: [K] of each sample among those of its prompt
        shared: whether all samples of a prompt have the same levels and noise
        name: of the draws
    """

    batch: ScoredBatch
    sigma: Tensor
    place: Tensor
    shared: bool
    name: str

    @classmethod
    def draw(cls, batch: ScoredBatch, levels: int, sigma_min: float, shared: bool, name: str, objective: str) -> Self:
        """Choose the noise levels.

        Args:
            batch: whose samples
            levels: M
            sigma_min: least sigma
            shared: see above
            name: of the draws
            objective: for messages

        Raises:
            ValueError: fewer than M levels of the grid are at least `sigma_min`.
        """
        trajectories = batch.trajectories
        grid = require_levels(trajectories.sigmas[:-1], levels, sigma_min, objective)
        group = trajectories.group
        place = torch.zeros_like(group)
        for index in range(len(trajectories.condition)):
            mine = group == index
            place[mine] = torch.arange(int(mine.sum()), device=group.device)
        ids = trajectories.condition.ids[group.to(trajectories.condition.ids.device)].tolist()
        chosen = [
            batch.streams.generator(f"{name}/levels", prompt, 0 if shared else sample).choice(len(grid), levels, replace=False).tolist()
            for prompt, sample in zip(ids, place.tolist(), strict=True)
        ]
        return cls(batch, grid[torch.tensor(chosen, device=grid.device)], place, shared, name)

    def __len__(self) -> int:
        return self.sigma.numel()

    @property
    def levels(self) -> int:
        """M."""
        return self.sigma.shape[1]

    @property
    def sample(self) -> Tensor:
        """[U] the sample of each unit."""
        return torch.arange(len(self), device=self.sigma.device) // self.levels

    def at(self, units: Tensor) -> Noised:
        """The units [B], which are chosen by index."""
        trajectories, streams = self.batch.trajectories, self.batch.streams
        units = units.to(self.sigma.device)
        sample, level = units // self.levels, units % self.levels
        stored, prompt = trajectories.samples[sample], trajectories.group[sample]
        clean = stored.to(torch.promote_types(stored.dtype, torch.float32))
        ids = trajectories.condition.ids[prompt.to(trajectories.condition.ids.device)].tolist()
        node = level if self.shared else self.place[sample] * _PER_SAMPLE + level
        noise = streams.normals(clean.shape[1:], f"{self.name}/noise", ids, node.tolist()).to(clean)
        sigma = self.sigma[sample, level]
        wide = sigma.reshape(-1, *(1,) * (clean.ndim - 1)).to(clean.dtype)
        latents = ((1 - wide) * clean + wide * noise).to(stored.dtype)
        return Noised(latents, sigma, trajectories.condition.select(prompt), noise - clean)

    def require_finite(self, values: Tensor, units: Tensor, whose: str) -> None:
        """Refuse numbers that are not finite.

        Args:
            values: [B] of the units [B]
            whose: weights, for the message

        Raises:
            NonFiniteError: naming sigma and prompt.
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


def require_levels(grid: Tensor, levels: int, sigma_min: float, objective: str) -> Tensor:
    """The noise levels [n] of a rollout that are at least `sigma_min`, if there are as many as are to be drawn.

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
