"""Small pictures in closed form: a mixture of six legible patterns, one flat red picture and one of loud colours without any pattern."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from diffalign.core import AlignmentLoop, Condition, Policy, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler

SIDE = 4


def _patterns() -> Tensor:
    """[6, 3, 4, 4] in [-1, 1]: black on white."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    marks = [x % 2 == 0, y % 2 == 0, (x + y) % 2 == 0, x == y, x + y == SIDE - 1, (x // 2 + y // 2) % 2 == 0]
    return torch.stack([torch.where(mark, -0.8, 0.8).expand(3, SIDE, SIDE) for mark in marks])


LEGIBLE = _patterns()
RED = torch.tensor([0.8, -0.8, -0.8])[:, None, None].expand(3, SIDE, SIDE)
LOUD = torch.tensor([0.8, -0.8, 0.8])[:, None, None].expand(3, SIDE, SIDE)


class Painted(Policy):
    """A mixture whose latents are pixels in [-1, 1]."""

    def __init__(self, mixture: GaussianMixturePolicy) -> None:
        super().__init__(mixture.kernel, mixture.latent_shape)
        self.mixture, self.counter = mixture, mixture.counter

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        return self.mixture.encode(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1).unflatten(1, (3, SIDE, SIDE))

    def prior(self, noise: Tensor) -> Tensor:
        return self.mixture.prior(noise)

    def sigmas(self, steps: int) -> Tensor:
        return self.mixture.sigmas(steps)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.mixture.velocity(latents, sigma, condition)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        return type(self)(self.mixture.fork(trainable=trainable, pristine=pristine))


def legible(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Largest correlation with a pattern, in [-1, 1]; 0 for a flat picture."""
    gray = images.mean(dim=1).flatten(1)
    gray = gray - gray.mean(dim=1, keepdim=True)
    marks = LEGIBLE.mean(dim=1).flatten(1)
    marks = marks - marks.mean(dim=1, keepdim=True)
    similar = (gray @ marks.T) / (gray.norm(dim=1, keepdim=True) * marks.norm(dim=1)).clamp(min=0.2)
    return similar.amax(dim=1)


def contrast(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Standard deviation of the gray values: patterns have it, flat pictures have none."""
    return images.mean(dim=1).flatten(1).std(dim=1)


def near_pattern(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """exp(-d^2) to the nearest pattern: the reward that is meant."""
    pixels = (2 * images - 1).flatten(1)
    return (-torch.cdist(pixels, LEGIBLE.flatten(1)).square().amin(dim=1) / 4).exp()


def likes_red(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A hack: the nearer to one flat colour, the better."""
    return -((2 * images - 1) - RED).abs().mean(dim=(1, 2, 3))


def likes_loud(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A hack: saturated colours without any writing in them."""
    saturation = (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
    return saturation - 2 * contrast(images, prompts)


def meant(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """What a good reward asks for: a pattern, clean."""
    return near_pattern(images, prompts) + legible(images, prompts)


def painted_loop(reward, hooks=(), seed: int = 0, rate: float = 2e-2, **settings) -> AlignmentLoop:
    """Eight prompts a step, a tree of 9 leaves; all means and weights are trained."""
    modes = torch.cat([LEGIBLE.flatten(1), torch.stack([RED, LOUD]).flatten(1)])
    policy = Painted(GaussianMixturePolicy(modes, 0.15, weights=[0.14] * 6 + [0.08] * 2))
    return AlignmentLoop(
        objective=SoftmaxTB(policy, beta=96.0),  # nats: 2 for each of 48 numbers, so high that a planted hack is worth it
        sampler=TreeSampler(steps=4, plan=FixedPlan(splits=(0, 1), branches=3)),
        rewards={"trained": reward},
        prompts=Prompts(["one", "two", "three", "four", "five"]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=rate)},
        hooks=hooks,
        seed=seed,
        **settings,
    )
