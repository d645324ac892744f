"""The frontier of a rollout, and the nodes that it leaves behind.

Structure stays on the host, which decides by it: a device that runs on its own is not waited for. States stay where they are.

Legend: B rows of the frontier.
"""

import attrs
import torch
from torch import Tensor

from diffalign.core import ROOT, UNRECORDED, Condition, TrajectoryBatch


@attrs.frozen(eq=False)
class Frontier:
    """The rows that a rollout goes on from: those of a prompt together, siblings next to each other.

    Args:
        prompt: [B] number of the prompt
        place: [B] place in the prompt's own frontier
        node: [B] the stored node that a row is, or descends from
    """

    prompt: Tensor
    place: Tensor
    node: Tensor

    @classmethod
    def of_roots(cls, prompts: int, roots: int) -> "Frontier":
        """The beginnings of some prompts, above the first stored node."""
        prompt = torch.arange(prompts).repeat_interleave(roots)
        return cls(prompt, torch.arange(roots).repeat(prompts), torch.full_like(prompt, ROOT))

    def branched(self, children: int) -> tuple["Frontier", Tensor]:
        """The frontier of the children, and the row of each child's parent."""
        parents = torch.arange(len(self.prompt)).repeat_interleave(children)
        place = self.place[parents] * children + torch.arange(children).repeat(len(self.prompt))
        return Frontier(self.prompt[parents], place, self.node[parents]), parents


@attrs.frozen(eq=False)
class Drawn:
    """The stochastic edges that lead to the nodes of a level.

    Args:
        eta: noise level of the step
        mean: [B, *] of the transitions
        log_prob: [B] of the states that were drawn
        call: [B] the network call that gave the mean
    """

    eta: float
    mean: Tensor
    log_prob: Tensor
    call: Tensor


@attrs.define(eq=False)
class Nodes:
    """Collects the stored nodes of a forest, level by level."""

    levels: list[int] = attrs.field(factory=list)
    parents: list[int] = attrs.field(factory=list)
    prompts: list[int] = attrs.field(factory=list)
    noise_levels: list[float] = attrs.field(factory=list)
    calls: list[int] = attrs.field(factory=list)
    latents: list[Tensor] = attrs.field(factory=list)
    log_probs: list[Tensor] = attrs.field(factory=list)
    means: list[Tensor] = attrs.field(factory=list)

    def add(self, level: int, frontier: Frontier, latents: Tensor, drawn: Drawn | None = None) -> Frontier:
        """Store the rows of the frontier as nodes.

        Args:
            level: of the nodes
            frontier: whose rows become nodes, children of those that they descend from
            latents: [B, *] their states
            drawn: how they were drawn; None where the step had no noise

        Returns:
            The frontier at the new nodes.
        """
        start, count = len(self.levels), len(latents)
        self.levels += [level] * count
        self.parents += frontier.node.tolist()
        self.prompts += frontier.prompt.tolist()
        self.noise_levels += [0.0 if drawn is None else drawn.eta] * count
        self.calls += [UNRECORDED] * count if drawn is None else drawn.call.tolist()
        self.latents.append(latents)
        self.log_probs.append(torch.zeros(count, dtype=torch.float64, device=latents.device) if drawn is None else drawn.log_prob)
        self.means += [] if drawn is None else [drawn.mean]
        return attrs.evolve(frontier, node=torch.arange(start, start + count))

    def forest(self, condition: Condition, sigmas: Tensor) -> TrajectoryBatch:
        """All of it, on the device of the sigmas."""
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
