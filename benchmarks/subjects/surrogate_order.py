"""How well a surrogate reward tells good samples of a prompt from bad ones."""

import torch
from torch import Tensor

from diffalign.core import Policy, Streams, TrajectoryBatch
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step.matching import Queries
from diffalign.objectives.few_step.roles import unguided
from diffalign.objectives.few_step.stages import Rows
from diffalign.objectives.noising import bridge, mean_over_dimensions


def reference_of(objective: SurrogateReward) -> Policy:
    """Policy that the surrogate is compared with: its own reference, or the teacher without guidance."""
    named = objective.policies()
    return named.get("reference", unguided(named["teacher"]))


@torch.no_grad()
def implicit_rewards(objective: SurrogateReward, batch: TrajectoryBatch, draws: int, seed: int) -> Tensor:
    """d_ref - d_phi of every finished sample [K]: how much less the surrogate errs than its reference, at taus and noises of the group.

    Args:
        objective: its surrogate, its reference, and where it compares them
        batch: samples of deterministic trajectories
        draws: taus and noises over which the mean is taken
        seed: of these
    """
    named = objective.policies()
    rows = Rows.of(batch, (len(batch.sigmas) - 2,) * draws)
    queries = Queries(objective.reward_interval, objective.times, objective.surrogate_floor, "group", True, objective.surrogate_ceiling)
    tau, noise = queries(rows, Streams(seed), "order")
    noised, target = bridge(rows.end, rows.sigma_end, tau, noise)
    condition = named["teacher"].encode(batch.condition.prompts).select(rows.prompt)

    def errors(policy: Policy) -> Tensor:
        return mean_over_dimensions((policy.velocity(noised, tau, condition) - target).square())

    gained = (errors(reference_of(objective)) - errors(named["surrogate"])).double()
    return torch.zeros(len(batch.samples), dtype=gained.dtype).index_add(0, rows.sample, gained / draws)


def pairs_ordered(implicit: Tensor, rewards: Tensor, group: Tensor) -> float:
    """Share of the pairs of a group with different rewards in which the better one has the larger implicit reward; 1/2 is chance.

    Args:
        implicit, rewards, group: [K]

    Raises:
        ValueError: no group has two different rewards.
    """
    right, pairs = 0.0, 0
    for index in group.unique():
        mine = group == index
        better = rewards[mine][:, None] > rewards[mine][None, :]
        right += float((implicit[mine][:, None] > implicit[mine][None, :])[better].sum())
        pairs += int(better.sum())
    if pairs == 0:
        raise ValueError("pairs_ordered needs a group with two different rewards")
    return right / pairs
