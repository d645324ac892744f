"""The rollout that all samplers share: one batched transition per step over the frontier of all prompts."""

from contextlib import nullcontext

import attrs
import torch
from torch import Tensor

from diffalign.core import ROOT, Condition, Gaussian, Policy, Streams, TrajectoryBatch

from .plans import Branching

_PER_LEVEL = 1 << 32
"""Node ids are level * 2^32 + place in the prompt's own frontier: they do not depend on the other prompts."""


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
        policy: whose transitions are followed, at the size that the prompts ask for
        condition: P prompts
        branching: of T steps
        streams: noise is drawn by (prompt id, node id)
        rows: network rows per call; None takes the whole frontier at once
        keep_all: store every level; else only roots, both ends of stochastic edges, and leaves
        keep_graph: `mean` keeps the graph of its network rows, from the stored state of each parent on

    Returns:
        P * branching.leaves leaves, T calls if `rows` allows.
    """
    policy = policy.sized(condition.size)
    steps = len(branching.children)
    sigmas = policy.sigmas(steps)
    if len(sigmas) != steps + 1:
        raise ValueError(f"{type(policy).__name__}.sigmas({steps}) must have {steps + 1} entries; got {len(sigmas)}")
    device = policy.device
    sigmas = sigmas.to(device)
    prompt = torch.arange(len(condition), device=device).repeat_interleave(branching.roots)
    place = torch.arange(branching.roots, device=device).repeat(len(condition))
    latents = policy.prior(_noise(policy, condition, streams, 0, prompt, place))

    levels, parents, prompts, etas = [0] * len(prompt), [ROOT] * len(prompt), [prompt], [0.0] * len(prompt)
    stored, means, log_probs = [latents], [], [torch.zeros(len(prompt), dtype=torch.float64, device=device)]
    node = torch.arange(len(prompt))  # the stored node that each row of the frontier is, or descends from
    for step, (children, eta) in enumerate(zip(branching.children, branching.noise_levels, strict=True)):
        with torch.enable_grad() if keep_graph and eta > 0 else nullcontext():
            transition = _step(policy, latents, sigmas[step], sigmas[step + 1], condition.select(prompt), eta, rows)
            mean = transition.mean
        transition = attrs.evolve(transition, mean=mean.detach()) if keep_graph else transition
        if eta > 0 and not bool((transition.std > 0).all()):
            raise ValueError(
                f"step {step} (sigma {sigmas[step].item():.4g} -> {sigmas[step + 1].item():.4g}) is planned with eta {eta:g}, but "
                f"{type(policy.kernel).__name__} has no noise to give there. Keep stochastic steps above the last one."
            )
        copies = torch.arange(len(prompt), device=device).repeat_interleave(children)
        place = place[copies] * children + torch.arange(children, device=device).repeat(len(prompt))
        prompt, node = prompt[copies], node[copies.cpu()]
        if eta > 0:
            with torch.set_grad_enabled(mean.requires_grad):
                means.append(mean[copies])
            transition = attrs.evolve(transition, mean=transition.mean[copies], std=transition.std[copies])
            noise = _noise(policy, condition, streams, step + 1, prompt, place).to(transition.mean)
            latents = transition.sample(noise.to(device))
            log_prob = transition.log_prob(latents)
        else:
            latents = transition.mean
            log_prob = torch.zeros(len(prompt), dtype=torch.float64, device=device)
        needed = eta > 0 or step + 1 == steps or branching.noise_levels[step + 1] > 0
        if needed or keep_all:
            start = len(levels)
            levels += [step + 1] * len(prompt)
            parents += node.tolist()
            etas += [eta] * len(prompt)
            prompts.append(prompt)
            stored.append(latents)
            log_probs.append(log_prob)
            node = torch.arange(start, start + len(prompt))
    states = torch.cat(stored)
    return TrajectoryBatch(
        condition=condition,
        sigmas=sigmas,
        latents=states,
        level=torch.tensor(levels, device=device),
        parent=torch.tensor(parents, device=device),
        prompt=torch.cat(prompts),
        noise_level=torch.tensor(etas, device=device),
        log_prob=torch.cat(log_probs),
        mean=_joined(means, states),
    )


def _joined(means: list[Tensor], states: Tensor) -> Tensor:
    with torch.set_grad_enabled(any(mean.requires_grad for mean in means)):
        return torch.cat(means) if means else states[:0]


def _noise(policy: Policy, condition: Condition, streams: Streams, level: int, prompt: Tensor, place: Tensor) -> Tensor:
    prompt_ids = condition.ids[prompt.to(condition.ids.device)].tolist()
    return streams.normals(policy.latent_shape, "rollout", prompt_ids, [level * _PER_LEVEL + i for i in place.tolist()])


def _step(
    policy: Policy, latents: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Condition, eta: float, rows: int | None
) -> Gaussian:
    """The transition of all rows, at most `rows` per network call."""
    pieces = []
    for index in torch.arange(len(latents), device=latents.device).split(rows or len(latents)):
        count = len(index)
        level = torch.full((count,), eta, device=latents.device)
        pieces.append(policy.transition(latents[index], sigma.expand(count), sigma_next.expand(count), condition.select(index), level))
    if len(pieces) == 1:
        return pieces[0]
    return attrs.evolve(pieces[0], mean=torch.cat([piece.mean for piece in pieces]), std=torch.cat([piece.std for piece in pieces]))
