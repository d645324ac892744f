"""Rollout that all samplers share: one batched transition per step over the frontier of all prompts."""

from collections.abc import Sequence
from contextlib import nullcontext

import attrs
import torch
from torch import Tensor

from diffalign.core import Condition, Gaussian, Outline, Policy, Streams, TrajectoryBatch

from .nodes import Drawn, Frontier, Nodes
from .plans import Branching
from .solvers import Solver

_PER_LEVEL = 1 << 32
"""Factor in node ids: level * 2^32 + place in the prompt's own frontier. So ids do not depend on the other prompts."""


def roll_out(
    policy: Policy,
    condition: Condition,
    branching: Branching,
    streams: Streams,
    rows: int | None = None,
    keep_all: bool = False,
    keep_graph: bool = False,
) -> TrajectoryBatch:
    """Draw a forest.

    Args:
        policy: policy that gives the transitions, at the image size that the prompts ask for
        condition: P prompts
        branching: branching of T steps
        streams: noise is drawn by (prompt id, node id)
        rows: network rows per call; None takes the whole frontier at once
        keep_all: store every level; else only roots, both ends of stochastic edges, and leaves
        keep_graph: let `mean` keep the graph of its network rows, which begins at the stored state of each parent

    Returns:
        A forest with P * branching.leaves leaves. It takes T network calls if `rows` allows.

    Raises:
        ValueError: the plan wants noise at a step where the kernel has none, or more than it has, or the condition is not on the device of
            the weights.
    """
    policy = policy.sized(condition.size)
    sigmas = checked_grid(policy, branching.noise_levels)
    _require_placed(policy, condition)
    stored = _stored(branching, keep_all)
    frontier, nodes, calls = Frontier.of_roots(len(condition), branching.roots), Nodes(), 0
    latents = policy.prior(_noise(policy, condition, streams, 0, frontier))
    frontier = nodes.add(0, frontier, latents)
    for step, (children, eta) in enumerate(zip(branching.children, branching.noise_levels, strict=True)):
        with torch.enable_grad() if keep_graph and eta > 0 else nullcontext():
            transition = _step(policy, latents, sigmas[step], sigmas[step + 1], condition.select(frontier.prompt), eta, rows)
        call = calls + torch.arange(len(latents)) // (rows or len(latents))
        calls = int(call[-1]) + 1
        if eta > 0:
            frontier, parents = frontier.branched(children)
            edges = _of_children(transition, parents)
            drawn = attrs.evolve(edges, mean=edges.mean.detach()) if keep_graph else edges
            latents = drawn.sample(_noise(policy, condition, streams, step + 1, frontier).to(drawn.mean))
            frontier = nodes.add(step + 1, frontier, latents, Drawn(eta, edges.mean, drawn.log_prob(latents), call[parents]))
        else:
            latents = transition.mean  # a step without noise does not branch
            frontier = nodes.add(step + 1, frontier, latents) if step + 1 in stored else frontier
    return nodes.forest(condition, sigmas.to(policy.device))


def draw_ends(
    policy: Policy, condition: Condition, branching: Branching, solver: Solver, streams: Streams, rows: int | None = None
) -> TrajectoryBatch:
    """Draw finished samples by a solver, from the same initial noise as `roll_out`.

    Args:
        policy: policy that gives the velocities, at the image size that the prompts ask for
        condition: P prompts
        branching: T steps without noise, and the number of samples of a prompt
        solver: rule of the steps
        streams: noise is drawn by (prompt id, node id)
        rows: network rows per call; None takes all at once

    Returns:
        A forest of P * branching.roots nodes on the last level, without edges.

    Raises:
        ValueError: the grid has no such number of steps, or the condition is not on the device of the weights.
    """
    policy = policy.sized(condition.size)
    sigmas = checked_grid(policy, branching.noise_levels)
    _require_placed(policy, condition)
    frontier, nodes = Frontier.of_roots(len(condition), branching.roots), Nodes()
    latents = policy.prior(_noise(policy, condition, streams, 0, frontier))
    repeated, stored = condition.select(frontier.prompt), latents.dtype

    def velocity(states: Tensor, sigma: Tensor) -> Tensor:
        pieces = []
        for index in torch.arange(len(states)).split(rows or len(states)):
            some = slice(int(index[0]), int(index[-1]) + 1)
            level = sigma.expand(len(index)).to(states.device, non_blocking=True)
            part = repeated.select(index) if len(index) < len(states) else repeated
            pieces.append(policy.velocity(states[some].to(stored), level, part))
        return torch.cat(pieces).to(states.dtype)

    wide = torch.promote_types(stored, torch.float32)
    nodes.add(len(branching.children), frontier, solver.solve(velocity, latents.to(wide), sigmas).to(stored))
    return nodes.forest(condition, sigmas.to(policy.device))


def foreseen(policy: Policy, branching: Branching) -> Outline:
    """Describe a rollout of this branching, without drawing it.

    Raises:
        ValueError: the policy's grid has no such number of steps, a noisy step lies where the kernel gives no noise, or its eta is too
            large for it.
    """
    return Outline(branching.leaves, branching.noise_levels, checked_grid(policy, branching.noise_levels))


def _stored(branching: Branching, keep_all: bool) -> set[int]:
    """Levels whose nodes are stored: the roots, both ends of stochastic edges, and the leaves; with `keep_all` every level."""
    steps = range(len(branching.children))
    ends = {step + end for step in steps for end in (0, 1) if branching.noise_levels[step] > 0}
    return {0, len(steps), *(range(len(steps)) if keep_all else ends)}


def checked_grid(policy: Policy, noise_levels: Sequence[float]) -> Tensor:
    """Read the policy's sigmas for these steps, on the host: [T+1].

    Args:
        policy: policy whose grid and kernel are asked
        noise_levels: [T] eta of each step

    Raises:
        ValueError: their number does not fit the steps, a noisy step lies where the kernel gives no noise, or its eta is too large for it.
    """
    steps = len(noise_levels)
    sigmas = policy.sigmas(steps).cpu()
    if len(sigmas) != steps + 1:
        raise ValueError(f"{type(policy).__name__}.sigmas({steps}) must have {steps + 1} entries; got {len(sigmas)}")
    for step, eta in enumerate(noise_levels):
        if eta == 0:
            continue
        if eta > policy.kernel.largest_eta:
            raise ValueError(
                f"the eta of every step must be at most {policy.kernel.largest_eta:g} for {type(policy.kernel).__name__}; step {step} is "
                f"planned with {eta}. Take a smaller eta, or FlowSDE, which has no such limit."
            )
        point, start, end = torch.zeros(1, 1, dtype=sigmas.dtype), sigmas[step : step + 1], sigmas[step + 1 : step + 2]
        if not float(policy.kernel.step(point, point, start, end, torch.full((1,), eta)).std) > 0:
            raise ValueError(
                f"step {step} (sigma {float(start):.4g} -> {float(end):.4g}) is planned with eta {eta:g}, but "
                f"{type(policy.kernel).__name__} has no noise there. Plan stochastic steps before the last step."
            )
    return sigmas


def _require_placed(policy: Policy, condition: Condition) -> None:
    """Refuse encoded texts on another device than the policy's. Integers (lengths) may stay on the host.

    Raises:
        ValueError: a tensor is on another device; the message names it.
    """
    for name, tensor in condition.tensors.items():
        if tensor.is_floating_point() and tensor.device != policy.device:
            raise ValueError(
                f"{type(policy).__name__}.encode must give tensors on {policy.device}, where its weights are; {name!r} is on "
                f"{tensor.device}. Move it there in `encode`: `.to(self.device)`."
            )


def _noise(policy: Policy, condition: Condition, streams: Streams, level: int, frontier: Frontier) -> Tensor:
    prompt_ids = condition.ids[frontier.prompt.to(condition.ids.device)].tolist()
    return streams.normals(policy.latent_shape, "rollout", prompt_ids, [level * _PER_LEVEL + i for i in frontier.place.tolist()])


def _of_children(transition: Gaussian, parents: Tensor) -> Gaussian:
    """Transition of each child, which is that of its parent, with the graph if there is one."""
    with torch.set_grad_enabled(transition.mean.requires_grad):
        return transition.select(parents.to(transition.mean.device, non_blocking=True))


def _step(
    policy: Policy, latents: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Condition, eta: float, rows: int | None
) -> Gaussian:
    """Compute the transition of all rows, with at most `rows` per network call."""
    pieces = []
    for index in torch.arange(len(latents)).split(rows or len(latents)):
        some = slice(int(index[0]), int(index[-1]) + 1)
        count = len(index)
        start, end = (level.expand(count).to(latents.device, non_blocking=True) for level in (sigma, sigma_next))
        level = torch.full((count,), eta, device=latents.device)
        pieces.append(policy.transition(latents[some], start, end, condition.select(index) if count < len(latents) else condition, level))
    if len(pieces) == 1:
        return pieces[0]
    return attrs.evolve(pieces[0], mean=torch.cat([piece.mean for piece in pieces]), std=torch.cat([piece.std for piece in pieces]))
