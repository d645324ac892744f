"""Frontier of a rollout, and the nodes that are stored.

The structure of the tree stays on the host, which reads it, so the device is never waited for. The states stay on the device.

Legend: B rows of the frontier.
"""

import attrs
import torch
from torch import Tensor

from diffalign.core import ROOT, UNRECORDED, Condition, TrajectoryBatch


@attrs.frozen(eq=False)
class Frontier:
    """Rows from which a rollout continues. The rows of a prompt stand together, siblings next to each other.

    Args:
        prompt: [B] number of the prompt
        place: [B] place in the prompt's own frontier
        node: [B] stored node that the row is, or from which it descends
    """

    prompt: Tensor
    place: Tensor
    node: Tensor

    @classmethod
    def of_roots(cls, prompts: int, roots: int) -> "Frontier":
        """Make the frontier of the roots, before any node is stored."""
        prompt = torch.arange(prompts).repeat_interleave(roots)
        return cls(prompt, torch.arange(roots).repeat(prompts), torch.full_like(prompt, ROOT))

    def branched(self, children: int) -> tuple["Frontier", Tensor]:
        """Make the frontier of the children, and the row of each child's parent."""
        parents = torch.arange(len(self.prompt)).repeat_interleave(children)
        place = self.place[parents] * children + torch.arange(children).repeat(len(self.prompt))
        return Frontier(self.prompt[parents], place, self.node[parents]), parents


@attrs.frozen(eq=False)
class Drawn:
    """Stochastic edges that lead to the nodes of a level.

    Args:
        eta: noise level of the step
        mean: [B, *] means of the transitions
        log_prob: [B] log-probabilities of the states that were drawn
        call: [B] number of the network call that gave the mean
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
            level: level of the nodes
            frontier: rows that become nodes; their parents are the nodes from which they descend
            latents: [B, *] states of the nodes
            drawn: the edges by which they were drawn; None if the step had no noise

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
        """Build the forest of all stored nodes, on the device of the sigmas."""
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
