"""An objective of your own on noised ends: reward-weighted flow matching, arXiv:2502.06061."""

import attrs

from diffalign.core import Follower, Loss, Policy, group_log_softmax
from diffalign.objectives import ForwardLosses, ForwardObjective, GridDraws


@attrs.define(eq=False)
class RewardWeighted(ForwardObjective):
    """Flow matching on the policy's own samples, each weighted by softmax(beta R) in its group: a step of expectation maximisation."""

    policy: Policy
    beta: float = 4.0
    levels: int = 4
    updates: int = 1
    rows: int | None = None
    reference: Policy | None = attrs.field(default=None, init=False)
    old: Policy | None = attrs.field(default=None, init=False)
    _forward: ForwardLosses = attrs.field(init=False)

    def __attrs_post_init__(self):
        draws = GridDraws(self.levels, sigma_min=0.0, shared=True)
        self._forward = ForwardLosses(self.policy, None, Follower(0.0), draws, "reward_weighted", "RewardWeighted")

    def losses(self, batch, update):
        forward = self._forward.draw(batch, update, self.rows)
        share = group_log_softmax(self.beta * batch.rewards.double(), batch.trajectories.group).exp()
        weight = forward.weight * forward.size * share[forward.sample]

        def loss_of(noised, units):
            error = noised.error(noised.velocity(self.policy))
            return Loss((weight[units] * error).sum(), {"error": (error.detach().sum(), weight.new_tensor(len(units)))})

        yield from forward.apart(loss_of)
