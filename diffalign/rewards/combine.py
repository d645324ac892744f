"""Rewards that combine other rewards."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardFunction, Scores, score
from diffalign.core.demands import reach, require


@attrs.frozen(eq=False)
class WeightedSum(Reward):
    """Weighted sum of raw scores, sum_m w_m R_m, as one reward.

    To standardise rewards within the group before they are weighted, give the loop the rewards by name, and an aggregation.

    Args:
        rewards: rewards by name, each of which applies to every picture
        weights: weights by the same names; None weighs each 1
    """

    rewards: Mapping[str, RewardFunction]
    weights: Mapping[str, float] | None = None

    def __attrs_post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("WeightedSum.rewards must name at least one reward; got none")
        if self.weights is not None and self.weights.keys() != self.rewards.keys():
            odd = sorted(self.weights.keys() ^ self.rewards.keys())
            raise ValueError(f"WeightedSum.weights must name the same rewards as rewards; {odd[0]!r} is in only one of them")

    def reach(self) -> None:
        """Check the servers of the inner rewards."""
        reach(self.rewards.values())

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the rewards inside require."""
        require(self.rewards.values(), prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        weights = self.weights or dict.fromkeys(self.rewards, 1.0)
        scores = score(self.rewards, images, prompts)
        require_whole("WeightedSum", scores)
        return torch.stack([weights[name] * values for name, values in scores.items()]).sum(dim=0)


def require_whole(owner: str, scores: Scores) -> None:
    """Refuse scores that do not apply to every picture, of which a sum would make up the rest.

    Args:
        owner: class that adds them, for the message
        scores: raw scores by name

    Raises:
        ValueError: a reward has no score for some picture.
    """
    if partial := [name for name in scores if isinstance(scores.partial(name).plain(), Partial)]:
        raise ValueError(
            f"{owner}.rewards must apply to every picture; {partial[0]!r} does not. Give the run the rewards by name: its aggregation adds "
            "those that apply."
        )
