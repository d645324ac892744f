"""Search for numbers that are NaN or infinite, and for where they came from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import NonFiniteError
from .policy import Policy
from .types import ROOT, TrajectoryBatch

_MOST = 64
"""Rows of a call of the search at most."""


def require_finite(role: str, policy: Policy, trajectories: TrajectoryBatch, step: int) -> None:
    """Refuse a rollout with a number that is not finite.

    Args:
        role: name of the policy
        policy: the policy that rolled out
        trajectories: its forest
        step: step of the run

    Raises:
        NonFiniteError: a node holds such a number; the message names tensor, level, sigma and prompt of the first one.
    """
    latents = trajectories.latents.flatten(1).isfinite().all(dim=1)
    bad = ~(latents & trajectories.log_prob.isfinite())
    if not bool(bad.any()):
        return
    node = int(bad.nonzero()[0])
    tensor = "log-prob is" if bool(latents[node]) else "latents are"
    cause = ""
    parent = int(trajectories.parent[node])
    if parent != ROOT:
        where = _first_bad_velocity(policy, trajectories, torch.tensor([parent]))
        if where is not None:
            cause = f" The velocity at its parent (level {int(trajectories.level[parent])}) is not finite."
            if step > 0:  # the base was finite at the first step
                cause += " The weights have been moved since the first step: most probably the learning rate is too large."
    raise NonFiniteError(
        f"role {role!r}, step {step}, rollout: {tensor} not finite {_address(trajectories, node)}.{cause} Nothing was updated."
    )


def blame(policies: Mapping[str, Policy], trajectories: TrajectoryBatch) -> str:
    """Find where a loss or gradient that is not finite may come from: the first state of a batch with a velocity that is not finite.

    Args:
        policies: role -> weights
        trajectories: the batch

    Returns:
        A sentence with role, level, sigma and prompt. If all velocities are finite, the sentence says so and names the prompts. No call has
        more rows than the calls of the step, and where memory runs out even so, the sentence says that it is not known.
    """
    try:
        return _blame(policies, trajectories, min(_MOST, max((policy.counter.largest for policy in policies.values()), default=0) or _MOST))
    except torch.OutOfMemoryError:  # the number that is not finite is the error, and must not be hidden by this search
        return "Where it came from is not known: memory ran out in the search."


def _blame(policies: Mapping[str, Policy], trajectories: TrajectoryBatch, rows: int) -> str:
    inner = (trajectories.level < len(trajectories.sigmas) - 1).nonzero().squeeze(1)
    for role, policy in policies.items():
        for nodes in inner.split(rows):
            node = _first_bad_velocity(policy, trajectories, nodes)
            if node is not None:
                return f"The velocity of {role!r} is not finite {_address(trajectories, node)}."
    prompts = ", ".join(repr(str(prompt)) for prompt in trajectories.condition.prompts[:4])
    more = ", ..." if len(trajectories.condition.prompts) > 4 else ""
    return f"The velocities at the states of the batch are finite (prompts {prompts}{more})."


@torch.no_grad()
def _first_bad_velocity(policy: Policy, trajectories: TrajectoryBatch, nodes: Tensor) -> int | None:
    nodes = nodes.to(trajectories.latents.device)
    sigma = trajectories.sigmas[trajectories.level[nodes]]
    velocity = policy.velocity(trajectories.latents[nodes], sigma, trajectories.condition.select(trajectories.prompt[nodes]))
    bad = ~velocity.flatten(1).isfinite().all(dim=1)
    return int(nodes[int(bad.nonzero()[0])]) if bool(bad.any()) else None


def _address(trajectories: TrajectoryBatch, node: int) -> str:
    level = int(trajectories.level[node])
    prompt = str(trajectories.condition.prompts[int(trajectories.prompt[node])])
    return f"at level {level} (sigma {trajectories.sigmas[level].item():.4g}), prompt {prompt!r}"
