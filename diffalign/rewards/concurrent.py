"""Several rewards that are computed at the same time."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt, Reward, RewardFunction, Scores, score
from diffalign.core.demands import reach, require

from .combine import require_whole


@attrs.frozen(eq=False)
class Concurrent(Reward):
    """Weighted sum of raw scores, sum_m w_m R_m, like `WeightedSum`, with a thread for each reward.

    It saves time if rewards wait for different things: a model on the device, a judge over the network, text recognition on the CPU.
    The scores are the same as without threads. Rewards that share a network, or use torch's global generator, must not run together.

    Args:
        rewards: rewards by name, each of which applies to every picture
        weights: weights by the same names; None weighs each 1

    Raises:
        RewardError: (in a call) a reward failed; the error is raised when the others have finished.
    """

    rewards: Mapping[str, RewardFunction]
    weights: Mapping[str, float] | None = None

    def __attrs_post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("Concurrent.rewards must name at least one reward; got none")
        if self.weights is not None and self.weights.keys() != self.rewards.keys():
            odd = sorted(self.weights.keys() ^ self.rewards.keys())
            raise ValueError(f"Concurrent.weights must name the same rewards as rewards; {odd[0]!r} is in only one of them")

    def reach(self) -> None:
        """Check the servers of the inner rewards."""
        reach(self.rewards.values())

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the rewards inside require."""
        require(self.rewards.values(), prompts)

    def parts(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Raw scores by reward name, each [K].

        Raises:
            ValueError: a reward has no score for some picture.
        """
        scores = score_together(self.rewards, images, prompts)
        require_whole("Concurrent", scores)
        return dict(scores)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        weights = self.weights or dict.fromkeys(self.rewards, 1.0)
        return torch.stack([weights[name] * values for name, values in self.parts(images, prompts).items()]).sum(dim=0)


def score_together(rewards: Mapping[str, RewardFunction], images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """Score with a thread for each reward: raw scores by name, in the order of `rewards`. See `diffalign.core.score`.

    Raises:
        RewardError: a reward failed; of several errors, that of the first reward in this order is raised.
    """
    # each thread has its own current device, and a reward may mean the current one by "cuda"
    chosen = torch.accelerator.current_device_index() if images.device.type != "cpu" else None
    begin = (lambda: None) if chosen is None else partial(torch.accelerator.set_device_index, chosen)
    with ThreadPoolExecutor(max_workers=len(rewards), thread_name_prefix="reward", initializer=begin) as pool:
        futures = {name: pool.submit(score, {name: reward}, images, prompts) for name, reward in rewards.items()}
    return Scores({name: future.result().parts[name] for name, future in futures.items()})
