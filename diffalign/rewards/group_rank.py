"""The rank of a picture among those of its prompt."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import GroupReward, Partial, Prompt, RewardFunction, score
from diffalign.core.demands import reach, require


@attrs.frozen(eq=False)
class GroupRank(GroupReward):
    """The rank of a reward within the group, from 0 (least) to 1: only the order counts, whatever the reward's scale.

        r_i = (#{j: R_j < R_i} + (#{j: R_j = R_i} - 1) / 2) / (n - 1)     over the n pictures of the group, i among the equal ones

    Equal pictures share their mean rank; a picture alone has 1/2. The mean of a group is 1/2, so that `reward` in the metrics says nothing
    about progress: name the reward itself beside it, with weight 0, to see that. A few pictures that the reward misjudges by a lot move no
    others.

    Args:
        reward: reward that is ranked; an image to which it does not apply has no rank
    """

    reward: RewardFunction

    def reach(self) -> None:
        """Check the server of the inner reward."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Ask the inner reward."""
        require([self.reward], prompts)

    def of_groups(self, images: Tensor, prompts: Sequence[Prompt], group: Tensor) -> Tensor | Partial:
        """Rank the images: [K]; see the class."""
        part = score({"GroupRank.reward": self.reward}, images, prompts).partial("GroupRank.reward")
        ranks = torch.zeros_like(part.values)
        index = part.applies.nonzero().squeeze(1)
        ranks[index] = _ranks(part.values[index], group[index])
        return Partial(ranks, part.applies).plain()


def _ranks(values: Tensor, group: Tensor) -> Tensor:
    same = group[:, None] == group[None, :]
    below = (same & (values[None, :] < values[:, None])).sum(dim=1)
    equal = (same & (values[None, :] == values[:, None])).sum(dim=1) - 1
    others = same.sum(dim=1) - 1
    return torch.where(others > 0, (below + equal / 2) / others.clamp(min=1), 0.5)
