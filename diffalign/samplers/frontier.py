"""The rollout that all samplers share: one batched transition per step over the frontier of all prompts."""

from collections.abc import Sequence
from contextlib import nullcontext

import attrs
import torch
from torch import Tensor

from diffalign.core import ROOT, UNRECORDED, Condition, Gaussian, Policy, Streams, TrajectoryBatch

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

    Raises:
        ValueError: a step that is planned with noise where the kernel has none to give, or a condition on another device than the weights.
    """
    policy = policy.sized(condition.size)
    steps = len(branching.children)
    sigmas = _grid(policy, branching)
    device = policy.device
    _require_placed(policy, condition)
    # the structure of the forest stays on the host, which decides by it; a device that runs on its own is not waited for
    prompt = torch.arange(len(condition)).repeat_interleave(branching.roots)
    place = torch.arange(branching.roots).repeat(len(condition))
    latents = policy.prior(_noise(policy, condition, streams, 0, prompt, place))
    nodes, calls = _Nodes(), 0
    node = nodes.add(0, [ROOT] * len(prompt), prompt, latents)  # the stored node that each row of the frontier is, or descends from
    for step, (children, eta) in enumerate(zip(branching.children, branching.noise_levels, strict=True)):
        with torch.enable_grad() if keep_graph and eta > 0 else nullcontext():
            transition = _step(policy, latents, sigmas[step], sigmas[step + 1], condition.select(prompt), eta, rows)
        parents = torch.arange(len(prompt)).repeat_interleave(children)
        call = calls + parents // (rows or len(prompt))
        calls = int(call[-1]) + 1
        place = place[parents] * children + torch.arange(children).repeat(len(prompt))
        prompt, node = prompt[parents], node[parents]
        if eta > 0:
            with torch.set_grad_enabled(transition.mean.requires_grad):
                transition = transition.select(parents.to(device, non_blocking=True))
            drawn = attrs.evolve(transition, mean=transition.mean.detach()) if keep_graph else transition
            latents = drawn.sample(_noise(policy, condition, streams, step + 1, prompt, place).to(drawn.mean))
            node = nodes.add(step + 1, node.tolist(), prompt, latents, eta, transition.mean, drawn.log_prob(latents), call)
        else:
            latents = transition.mean  # a step without noise does not branch
            if keep_all or step + 1 == steps or branching.noise_levels[step + 1] > 0:
                node = nodes.add(step + 1, node.tolist(), prompt, latents)
    return nodes.forest(condition, sigmas.to(device))


@attrs.define(eq=False)
class _Nodes:
    """The stored nodes of a forest, collected level by level. Structure is kept on the host, states where they are."""

    levels: list[int] = attrs.field(factory=list)
    parents: list[int] = attrs.field(factory=list)
    prompts: list[int] = attrs.field(factory=list)
    noise_levels: list[float] = attrs.field(factory=list)
    calls: list[int] = attrs.field(factory=list)
    latents: list[Tensor] = attrs.field(factory=list)
    log_probs: list[Tensor] = attrs.field(factory=list)
    means: list[Tensor] = attrs.field(factory=list)

    def add(
        self,
        level: int,
        parents: Sequence[int],
        prompts: Tensor,
        latents: Tensor,
        eta: float = 0.0,
        mean: Tensor | None = None,
        log_prob: Tensor | None = None,
        call: Tensor | None = None,
    ) -> Tensor:
        """Store nodes of one level, in the order of the frontier; a stochastic edge has a mean, a log-probability and a call.

        Returns:
            [B] their numbers.
        """
        start, count = len(self.levels), len(parents)
        self.levels += [level] * count
        self.parents += parents
        self.prompts += prompts.tolist()
        self.noise_levels += [eta] * count
        self.calls += [UNRECORDED] * count if call is None else call.tolist()
        self.latents.append(latents)
        self.log_probs.append(torch.zeros(count, dtype=torch.float64, device=latents.device) if log_prob is None else log_prob)
        if mean is not None:
            self.means.append(mean)
        return torch.arange(start, start + count)

    def forest(self, condition: Condition, sigmas: Tensor) -> TrajectoryBatch:
        """All of it."""
        latents, device = torch.cat(self.latents), sigmas.device
        with torch.set_grad_enabled(any(mean.requires_grad for mean in self.means)):
            mean = torch.cat(self.means) if self.means else latents[:0]
        level, parent, prompt, call = torch.tensor([self.levels, self.parents, self.prompts, self.calls]).to(device, non_blocking=True)
        return TrajectoryBatch(
            condition=condition,
            sigmas=sigmas,
            latents=latents,
            level=level,
            parent=parent,
            prompt=prompt,
            noise_level=torch.tensor(self.noise_levels).to(device, non_blocking=True),
            log_prob=torch.cat(self.log_probs),
            mean=mean,
            call=call,
        )


def _grid(policy: Policy, branching: Branching) -> Tensor:
    """The policy's sigmas for these steps, on the host: [T+1].

    Raises:
        ValueError: they are not as many as the steps, or a noisy step lies where the kernel gives no noise.
    """
    steps = len(branching.children)
    sigmas = policy.sigmas(steps).cpu()
    if len(sigmas) != steps + 1:
        raise ValueError(f"{type(policy).__name__}.sigmas({steps}) must have {steps + 1} entries; got {len(sigmas)}")
    for step, eta in enumerate(branching.noise_levels):
        if eta == 0:
            continue
        point, start, end = torch.zeros(1, 1, dtype=sigmas.dtype), sigmas[step : step + 1], sigmas[step + 1 : step + 2]
        if not float(policy.kernel.step(point, point, start, end, torch.full((1,), eta)).std) > 0:
            raise ValueError(
                f"step {step} (sigma {float(start):.4g} -> {float(end):.4g}) is planned with eta {eta:g}, but "
                f"{type(policy.kernel).__name__} has no noise to give there. Keep stochastic steps above the last one."
            )
    return sigmas


def _require_placed(policy: Policy, condition: Condition) -> None:
    """Refuse encoded texts on another device than the policy's; whole numbers (lengths) may stay on the host.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in condition.tensors.items():
        if tensor.is_floating_point() and tensor.device != policy.device:
            raise ValueError(
                f"{type(policy).__name__}.encode must give tensors on {policy.device}, where its weights are; {name!r} is on "
                f"{tensor.device}. Move it there in `encode`: `.to(self.device)`."
            )


def _noise(policy: Policy, condition: Condition, streams: Streams, level: int, prompt: Tensor, place: Tensor) -> Tensor:
    prompt_ids = condition.ids[prompt.to(condition.ids.device)].tolist()
    return streams.normals(policy.latent_shape, "rollout", prompt_ids, [level * _PER_LEVEL + i for i in place.tolist()])


def _step(
    policy: Policy, latents: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Condition, eta: float, rows: int | None
) -> Gaussian:
    """The transition of all rows, at most `rows` per network call."""
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
