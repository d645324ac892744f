"""Reward within bounds."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardFunction, score
from diffalign.core.demands import reach, require


@attrs.frozen(eq=False)
class Clipped(Reward):
    """Clipped reward, clip(R, low, high): a score beyond the bounds brings no further gain.

    Scores that are not finite are refused before they are clipped.

    Args:
        reward: reward that is clipped; a picture to which it does not apply has no score
        low: least value; None means no bound
        high: largest value; None means no bound
    """

    reward: RewardFunction
    low: float | None = None
    high: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("Clipped needs low, high or both; got neither")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"Clipped.low must be below high; got {self.low:g} and {self.high:g}")

    def reach(self) -> None:
        """Check the server of the inner reward."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the reward inside requires."""
        require([self.reward], prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        part = score({"Clipped.reward": self.reward}, images, prompts).partial("Clipped.reward")
        return Partial(torch.clamp(part.values, self.low, self.high), part.applies).plain()
