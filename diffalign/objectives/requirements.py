"""Checks of an objective's settings and of a batch, before any weight moves."""

import torch
from torch import Tensor

from diffalign.core import NonFiniteError, Outline, Policy, Progress, Scalar, TrajectoryBatch, require_frozen, scalar
from diffalign.core.given import require_part
from diffalign.core.number_fields import require_number


def require_comparable_outline(outline: Outline, objective: str) -> None:
    """Check what `require_comparable` checks, before anything is drawn.

    Raises:
        ValueError: no stochastic step, or a single sample of a prompt.
    """
    if not any(outline.noise_levels):
        raise ValueError(
            f"{objective} needs stochastic steps, but the sampler draws deterministic trajectories alone. Take TreeSampler or "
            "ChainSampler, whose steps have an eta > 0, or an objective for deterministic trajectories."
        )
    require_several(outline, objective)


def require_several(outline: Outline, objective: str) -> None:
    """Check what `require_groups` checks, before anything is drawn.

    Raises:
        ValueError: a single sample of a prompt.
    """
    if outline.samples < 2:
        raise ValueError(
            f"{objective} needs at least 2 samples per prompt to compare; the sampler draws {outline.samples}. Give the sampler more "
            "`samples`, or its plan a branching step or more roots."
        )


def require_comparable(trajectories: TrajectoryBatch, objective: str) -> None:
    """Refuse a batch that an objective over stochastic trajectories cannot use.

    Raises:
        ValueError: there is no stochastic edge, or a prompt has a single sample.
    """
    if not len(trajectories.stochastic):
        raise ValueError(
            f"{objective} needs stochastic steps, but every edge of this batch is deterministic. Give the plan an eta > 0, or use an "
            "objective for deterministic trajectories."
        )
    require_groups(trajectories, objective)


def require_groups(trajectories: TrajectoryBatch, objective: str) -> None:
    """Refuse a batch in which a prompt has a single sample.

    Raises:
        ValueError: a prompt has a single sample; the message names the first such prompt.
    """
    sizes = torch.bincount(trajectories.group, minlength=len(trajectories.condition))
    alone = (sizes < 2).nonzero().squeeze(1)
    if len(alone):
        prompt = str(trajectories.condition.prompts[int(alone[0])])
        raise ValueError(
            f"{objective} needs at least 2 samples per prompt to compare; prompt {prompt!r} has {int(sizes[alone[0]])}. Use a plan with a "
            "branching step or more roots."
        )


def require_positive(value: float, name: str, reason: str) -> None:
    """Refuse a number that is not above zero.

    Raises:
        ValueError: the number is not positive.
    """
    if not value > 0:
        raise ValueError(f"{name} must be positive: {reason}; got {value:g}")


def require_weight(value: float, name: str) -> None:
    """Refuse a number that is no weight of a penalty.

    Raises:
        ValueError: it is no number, negative or not finite.
    """
    require_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite: it is the weight of a penalty; got {value:g}")


def weight_at(weight: Scalar | float, progress: Progress, name: str) -> float:
    """Weight of a penalty at a step.

    Raises:
        ValueError: a schedule gives a number that is negative or not finite.
    """
    value = scalar(weight)(progress)
    require_weight(value, f"{name} at step {progress.step}")
    return value


def require_finite(log_prob: Tensor, trajectories: TrajectoryBatch, child: Tensor, whose: str) -> None:
    """Refuse log-probabilities that are not finite.

    Args:
        log_prob: [E] of the edges into the nodes `child` [E]
        whose: name of the weights in the message

    Raises:
        NonFiniteError: one of them is not finite; the message names level, sigma and prompt.
    """
    bad = (~log_prob.detach().isfinite()).nonzero().squeeze(1)
    if len(bad):
        node = child[bad[0]]
        level = int(trajectories.level[node])
        prompt = str(trajectories.condition.prompts[int(trajectories.prompt[node])])
        raise NonFiniteError(
            f"replay: the log-prob under the {whose} is {log_prob[bad[0]].item()} at level {level} "
            f"(sigma {trajectories.sigmas[level].item():.4g}), prompt {prompt!r}. Nothing was updated."
        )


def group_has_spread(rewards: Tensor, group: Tensor, spread: float = 0.0) -> Tensor:
    """True where the rewards of a sample's group differ by more than `spread`: [K]."""
    values = rewards.double()
    start = values.new_zeros(int(group.max()) + 1)
    high, low = (start.scatter_reduce(0, group, values, how, include_self=False)[group] for how in ("amax", "amin"))
    return high - low > spread


def optional_reference(policy: Policy, reference: Policy | None, weight: float, weight_name: str) -> Policy | None:
    """Frozen reference of a penalty: the given one, or a fork of the policy as it is, or None if the weight is 0.

    Args:
        policy: the weights being aligned
        reference: reference that the user gave
        weight: weight of the penalty
        weight_name: name of the weight in messages, "Class.field"

    Raises:
        ValueError: the policy is none, the weight is negative, the reference is trainable, or the reference has no use.
    """
    require_part("policy", policy, Policy)
    require_weight(weight, weight_name)
    if weight == 0:
        if reference is not None:
            raise ValueError(f"{weight_name.partition('.')[0]}.reference has no use if {weight_name} is 0; leave it out, or give a weight")
        return None
    return given_reference(policy, reference)


def given_reference(policy: Policy, reference: Policy | None) -> Policy:
    """Reference of an objective: the given one, or a fork of the policy as it is, which skips adapters that add nothing yet.

    Args:
        policy: the weights being aligned
        reference: reference that the user gave

    Raises:
        ValueError: the policy or the reference is none, or the reference is trainable.
    """
    require_part("policy", policy, Policy)
    reference = policy.fork(pristine=policy.without_delta) if reference is None else reference
    require_part("reference", reference, Policy)
    require_frozen(reference, "reference")
    return reference
