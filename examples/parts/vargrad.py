"""An objective of your own: log-variance (VarGrad) trajectory balance, arXiv:2010.10436."""

import attrs

from diffalign.core import Edges, Loss, Objective, Phase, Policy, group_mean, group_sum, micro_batched, replay_log_prob


@attrs.define(eq=False)
class VarGrad(Objective):
    """The variance within a prompt of log p_theta(tau) - log p_ref(tau) - beta R, which is zero exactly at the tilted reference."""

    policy: Policy
    beta: float = 4.0
    rows: int | None = None
    reference: Policy = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.reference = self.policy.fork()

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses),)

    def _losses(self, batch, update):
        forest = batch.trajectories
        edges = Edges.of(forest)
        if not len(edges.child):
            raise ValueError("VarGrad needs stochastic steps, but every edge of this batch is deterministic")

        def evaluate(parents):
            some = edges.below(parents)
            return {"ratio": replay_log_prob(self.policy, forest, some) - replay_log_prob(self.reference, forest, some).detach()}

        def loss_of(values):
            path = forest.path_sum(values["ratio"].new_zeros(len(forest.latents)).index_copy(0, edges.child, values["ratio"]))
            gap = path - self.beta * batch.rewards.double()
            variance = (gap - group_mean(gap, forest.group)).square() / group_sum(gap.new_ones(len(gap)), forest.group)
            return Loss(variance.sum() / batch.groups)

        yield from micro_batched(evaluate, len(edges.parent), loss_of, self.rows)
