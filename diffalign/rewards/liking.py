"""Binary reward: liked or not."""

from collections.abc import Sequence

import attrs
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardFunction, score
from diffalign.core.demands import reach, require


@attrs.frozen(eq=False)
class BinaryLiking(Reward):
    """Binary feedback: 1 if the image is liked, 0 if it is not.

        reward = 1 if R(image, prompt) >= threshold else 0

    R is any reward. For feedback by a person, R is a function or a `RemoteReward` that asks the person, with threshold 0.5. Groups in
    which all images are liked, or none, teach nothing.
    Scale: 0 or 1. Licence: that of R.

    Args:
        reward: the reward R; a picture to which it does not apply is neither liked nor not
        threshold: least score of an image that is liked

    Reference: TDM-R1 trains on such feedback, arXiv:2603.07700.
    """

    reward: RewardFunction
    threshold: float

    def reach(self) -> None:
        """Check the server of the inner reward."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the reward inside requires."""
        require([self.reward], prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        part = score({"BinaryLiking.reward": self.reward}, images, prompts).partial("BinaryLiking.reward")
        return Partial((part.values >= self.threshold).to(part.values.dtype), part.applies).plain()
