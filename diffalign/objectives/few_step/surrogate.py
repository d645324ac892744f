"""The surrogate's loss: a density ratio that learns which states of a group the reward prefers.

Legend: B rows, * latent dimensions.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from diffalign.core import Condition, Loss, Policy, UpdateRows, group_mean, micro_batched

from ..noising import bridge, mean_over_dimensions
from .group_objectives import GroupObjective
from .roles import Beside
from .stages import Rows
from .trust_regions import TrustRegion, ran_away


def evaluated_by_surrogate(rows: int, roles: Beside, trust_region: TrustRegion) -> UpdateRows:
    """Network rows of one update of the surrogate, at that many stages of a prompt's samples."""
    frozen = 1 + (roles.reference is not roles.start) + trust_region.reads_old
    return UpdateRows((rows,), (rows,) * frozen, compared=(rows,))


def prefer(
    roles: Beside,
    rows: Rows,
    condition: Condition,
    drawn: tuple[Tensor, Tensor],
    advantage: Tensor,
    weight: Tensor,
    group_objective: GroupObjective,
    trust_region: TrustRegion,
    runaway: float | None,
    regularization: float,
    budget: int | None,
) -> Iterator[Loss]:
    """Sum_i weight_i (group loss_i + regularization mean ||v_phi - v_psi||^2_i).

    Args:
        roles: the policies
        rows: states at the ends of stages
        condition: condition of the teacher
        drawn: taus [B] and noises [B, *], equal within a group
        advantage: [B]
        weight: [B]
        group_objective, trust_region, runaway, regularization: see `SurrogateReward`
        budget: rows per micro-batch
    """
    tau, noise = drawn
    noised, target = bridge(rows.end, rows.sigma_end, tau, noise)

    def velocity(policy: Policy, index: Tensor) -> Tensor:
        return policy.velocity(noised[index], tau[index], condition.select(rows.prompt[index]))

    def frozen(policy: Policy) -> Tensor:
        with torch.no_grad():
            return torch.cat([velocity(policy, index) for index in rows.pieces(budget)])

    def errors(velocities: Tensor) -> Tensor:
        return mean_over_dimensions((velocities - target).square())

    anchor = frozen(roles.start)
    reference = errors(anchor if roles.reference is roles.start else frozen(roles.reference))
    old = errors(frozen(roles.old)) if trust_region.reads_old else reference
    group = rows.group

    def evaluate(index: Tensor) -> dict[str, Tensor]:
        index = index.to(noised.device)
        mine = velocity(roles.surrogate, index)
        return {
            "error": mean_over_dimensions((mine - target[index]).square()),
            "gap": mean_over_dimensions((mine - anchor[index]).square()),
        }

    def loss_of(values: Mapping[str, Tensor]) -> Loss:
        error, gap = values["error"], values["gap"]
        now = error.detach()
        outside = trust_region.outside(now, old, advantage)
        if runaway is not None:
            outside = outside | ran_away(now, reference, advantage, group_mean(gap.detach(), group), runaway)
        kept = torch.where(outside, now, error)
        per_row = group_objective(kept, reference, advantage, group) + regularization * gap
        count = torch.tensor(len(rows))
        right = (advantage * (reference - now)).sum()  # > 0 where good samples have gained on bad ones
        metrics = {
            "surrogate/preference": (right, count),
            "surrogate/gap": (gap.detach().sum(), count),
            "surrogate/outside": (outside.double().sum(), count),
            "surrogate/error": (now.sum(), count),
            "advantage/std": (advantage.std(unbiased=False) * count, count),
        }
        return Loss((per_row * weight).sum(), metrics)

    yield from micro_batched(evaluate, len(rows), loss_of, budget)


def regress(
    policy: Policy, rows: Rows, drawn: tuple[Tensor, Tensor], weight: Tensor, condition: Condition, budget: int | None
) -> Iterator[Loss]:
    """Sum_i weight_i ||v_i - v*_i||^2 on the rows of the surrogate, which makes `policy` the score of what is sampled now."""
    tau, noise = drawn
    noised, target = bridge(rows.end, rows.sigma_end, tau, noise)
    for index in rows.pieces(budget):
        velocity = policy.velocity(noised[index], tau[index], condition.select(rows.prompt[index]))
        error = mean_over_dimensions((velocity - target[index]).square())
        yield Loss((error * weight[index]).sum(), {"reference/error": (error.detach().sum(), torch.tensor(len(index)))})
