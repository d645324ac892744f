"""A sampler of your own: a tree whose leaves are pruned to the best at each level by how much their clean prediction pleases."""

import attrs
import torch

from diffalign.core import Condition, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.samplers import FixedPlan, roll_out


@attrs.frozen
class BestOfTree(TrajectorySampler):
    """Draws a tree and keeps, of each prompt, the branches below the `keep` nodes of a level with the brightest leaves."""

    steps: int = 6
    keep: int = 2
    plan: FixedPlan = attrs.field(factory=lambda: FixedPlan(splits=(1, 3)))

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        forest = roll_out(policy, condition, self.plan.draw(self.steps, progress, streams), streams)
        score = forest.node_mean(policy.decode(forest.samples).flatten(1).mean(dim=1).double())
        first = (forest.level == self.plan.splits[0] + 1).nonzero().squeeze(1)
        alive = forest.level <= self.plan.splits[0]
        for prompt in range(len(condition)):
            mine = first[forest.prompt[first] == prompt]
            alive[mine[score[mine].argsort(descending=True)[: self.keep]]] = True
        for node in range(len(alive)):  # parents precede children
            if forest.level[node] > self.plan.splits[0] + 1:
                alive[node] = alive[forest.parent[node]]
        place = alive.cumsum(0) - 1
        kept = {name: getattr(forest, name)[alive] for name in ("latents", "level", "prompt", "noise_level", "log_prob")}
        parent = torch.where(forest.parent[alive] < 0, -1, place[forest.parent[alive].clamp(min=0)])
        return TrajectoryBatch(condition, forest.sigmas, parent=parent, mean=forest.mean[alive[forest.stochastic]], **kept)
