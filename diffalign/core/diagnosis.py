"""Which fault a broken first-step contract looks like, from what can be measured on the spot.

Legend: U parents, E edges, * latent dimensions.
"""

from collections.abc import Iterator
from functools import cached_property

import attrs
import torch
from torch import Tensor

from .guided import Guided
from .policy import Policy
from .replay import Edges, replay_parents
from .transition import Gaussian
from .types import Condition, TrajectoryBatch
from .wrapper import PolicyAround

_FITS = 0.2
"""An explanation fits if it leaves at most this share of the deviation."""


@attrs.frozen(eq=False)
class Call:
    """A network call of a rollout, as it can be repeated.

    Args:
        trajectories: the forest
        edges: that go out from its rows
    """

    trajectories: TrajectoryBatch
    edges: Edges

    @cached_property
    def latents(self) -> Tensor:
        """[U, *]."""
        return self.trajectories.latents[self.edges.parent]

    @cached_property
    def level(self) -> Tensor:
        """[U]."""
        return self.trajectories.level[self.edges.parent]

    @cached_property
    def condition(self) -> Condition:
        """U rows; large, and needed only where something is wrong."""
        return self.trajectories.condition.select(self.edges.prompts)

    @cached_property
    def eta(self) -> Tensor:
        """[U]."""
        return self.trajectories.noise_level[self.edges.child[self.edges.first]]

    @property
    def rollout(self) -> Tensor:
        """[E, *] the means of the rollout."""
        return self.trajectories.mean[self.edges.row].detach()

    def sigma(self, shift: int = 0) -> Tensor:
        """[U] the sigma of the step, or one so many places further on the grid."""
        sigmas = self.trajectories.sigmas
        return sigmas[(self.level + shift).clamp(0, len(sigmas) - 1)]

    def velocity(self, policy: Policy, shift: int = 0) -> Tensor:
        """[U, *] of a policy."""
        return policy.velocity(self.latents, self.sigma(shift), self.condition)

    def mean(self, policy: Policy, velocity: Tensor, factor: float = 1.0) -> Tensor:
        """[U, *] where a velocity leads, at a multiple of the noise level."""
        return policy.kernel.step(self.latents, velocity, self.sigma(), self.sigma(1), self.eta * factor).mean

    def repeat(self, policy: Policy) -> Gaussian:
        """The transition now: mean [U, *], std [U]."""
        return replay_parents(policy, self.trajectories, self.edges)

    def lengths(self, policy: Policy, means: Tensor) -> Tensor:
        """[U] what a deviation is measured in: the velocity's part of the step, ||mean - (mean with velocity 0)||, float64.

        A thousandth of the mean is added to it, for velocities near 0.
        """
        part = means - self.mean(policy, torch.zeros_like(means))
        return (_norm(part) + 1e-3 * _norm(means)).clamp(min=1e-30)


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values.flatten(1).double(), dim=1)
    return norm


@attrs.frozen(eq=False)
class Suspicion:
    """A network call that was repeated, and how far it is from the rollout.

    Args:
        policy: as it is now
        call: the one that was repeated
        now: [U, *] means as the repetition gave them
        lengths: [U] what deviations are measured in
        deviation: [E] of the means from those of the rollout
        noise: [E] relative difference of the stored log-probability from that of the stored mean
    """

    policy: Policy
    call: Call
    now: Tensor
    lengths: Tensor
    deviation: Tensor
    noise: Tensor

    @classmethod
    def of(cls, policy: Policy, call: Call) -> "Suspicion":
        """Repeat a call, and compare."""
        edges, trajectories, rollout = call.edges, call.trajectories, call.rollout
        with torch.set_grad_enabled(trajectories.mean.requires_grad):  # attention may take another kernel where there is a gradient
            again = call.repeat(policy)
        again = attrs.evolve(again, mean=again.mean.detach())
        lengths = call.lengths(policy, again.mean)
        deviation = _norm(rollout - again.mean[edges.owner]) / lengths[edges.owner]
        # given the mean, the log-density depends on the noise alone, and no network rounds it
        said = trajectories.log_prob[edges.child]
        given = attrs.evolve(again.select(edges.owner), mean=rollout).log_prob(trajectories.latents[edges.child])
        return cls(policy, call, again.mean, lengths, deviation, (given - said).abs() / (1 + said.abs()))

    @property
    def worst(self) -> float:
        """The largest deviation; not a number if one of them is not."""
        return float(torch.stack([self.deviation.max(), self.noise.max()]).max())

    def against(self, means: Tensor) -> float:
        """Largest deviation of the policy from these means [U, *] of its own."""
        return float((_norm(means - self.now) / self.lengths).max())

    def left_by(self, means: Tensor) -> float:
        """Largest deviation of these means [U, *] from the rollout, as a share of that of the replay."""
        owner = self.call.edges.owner
        left = _norm(self.call.rollout - means[owner]) / self.lengths[owner]
        return float(left.max() / self.deviation.max().clamp(min=1e-30))

    def address(self) -> tuple[int, float, float]:
        """Level of the worst edge, and the sigmas of its step."""
        worst = int(torch.maximum(self.deviation, self.noise).argmax())
        level, sigmas = int(self.call.level[self.call.edges.owner[worst]]), self.call.trajectories.sigmas
        return level, float(sigmas[level]), float(sigmas[level + 1])


def cause_of(suspicion: Suspicion) -> str:
    """A sentence or two on which fault it looks like, where types, repetitions and batch shapes have cleared themselves."""
    return next(_guesses(suspicion))


def _guesses(suspicion: Suspicion) -> Iterator[str]:
    """The explanations that fit, the surest first; always one."""
    policy, call = suspicion.policy, suspicion.call
    velocity = call.velocity(policy)
    factor, left = min(
        ((f / 100, suspicion.left_by(call.mean(policy, velocity, f / 100))) for f in range(50, 151)), key=lambda pair: pair[1]
    )
    if left < _FITS:
        yield (
            f"It looks like another noise level: the kernel gives the rollout's means at {factor:g} times the noise level that the "
            "trajectory says. Look for a plan, sampler, kernel or transition that changes it between rollout and replay."
        )
    if float(suspicion.noise.max()) > max(1e-5, float(suspicion.deviation.max())):
        yield "It looks like another noise level: the stored log-probabilities are not those of the stored means under the kernel's noise."
    for shift, where in ((1, "one further on"), (-1, "one before")):
        if suspicion.left_by(call.mean(policy, call.velocity(policy, shift))) < _FITS:
            yield f"It looks like a sigma that is one index off: the rollout's velocity is that of the sigma {where} on the grid."
    yield from _guidance(suspicion)
    with torch.autocast(call.latents.device.type, torch.bfloat16, enabled=policy.precision == torch.float32):
        rounded = call.velocity(policy).to(call.latents.dtype)
    if suspicion.left_by(call.mean(policy, rounded)) < _FITS:
        yield "It looks like a changed type: the rollout's velocity is that of bfloat16 (autocast, or weights that were cast)."
    moved = call.latents.roll(1, 0) + 0.1 * call.latents
    if torch.equal(policy.velocity(moved, call.sigma(), call.condition), velocity):
        yield "It looks like a stale cache: the velocity does not change with the latents."
    yield (
        "It looks like other weights or a stale cache: an adapter that was switched, merged or updated between rollout and replay, a "
        "condition that was encoded anew, another type of number, or a velocity that was kept from another call."
    )


def _guidance(suspicion: Suspicion) -> Iterator[str]:
    """Another scale: the difference lies along (conditional - unconditional)."""
    guided, call = suspicion.policy, suspicion.call
    while isinstance(guided, PolicyAround) and not isinstance(guided, Guided):
        guided = guided.policy
    if not isinstance(guided, Guided):
        return
    policy = suspicion.policy
    here = call.mean(policy, call.velocity(guided))
    slope = call.mean(policy, call.velocity(guided.scaled(guided.scale + 1))) - here

    def scale_of(means: Tensor) -> float:
        return float(((means - here) * slope).sum() / slope.square().sum().clamp(min=1e-30))

    then = scale_of(call.rollout[call.edges.first])
    if suspicion.left_by(here + then * slope) < _FITS:
        now = guided.scale + scale_of(suspicion.now)
        yield f"It looks like another guidance: the rollout's scale is {guided.scale + then:.4g}, the replay's {now:.4g}."
