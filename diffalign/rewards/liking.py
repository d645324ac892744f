"""Yes or no."""

from collections.abc import Sequence

import attrs
from torch import Tensor

from diffalign.core import Prompt, Reward, RewardFunction, score

from .requirements import reach, require


@attrs.frozen(eq=False)
class BinaryLiking(Reward):
    """Somebody's thumb: 1 where the image is liked, 0 where it is not, and nothing in between.

        reward = 1 if R(image, prompt) >= threshold else 0

    R is any reward; the thumb of a person is a function or a `RemoteReward` that asks one, with threshold 0.5. A signal without a
    gradient and with ties: groups in which all are liked, or none, teach nothing.
    Scale: 0 or 1. Licence: that of R.

    Args:
        reward: whose judgement it is
        threshold: from which on an image is liked

    Reference: TDM-R1 trains on such feedback, arXiv:2603.07700.
    """

    reward: RewardFunction
    threshold: float

    def reach(self) -> None:
        """As the reward inside."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """As the reward inside."""
        require([self.reward], prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = score({"BinaryLiking.reward": self.reward}, images, prompts)["BinaryLiking.reward"]
        return (scores >= self.threshold).to(scores.dtype)
