"""Diagnosis of a broken first-step contract: names the most probable fault, from measurements made at once.

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
"""Largest share of the deviation that may remain if an explanation is to fit."""

_EQUAL = 1e-5
"""Largest deviation of means that count as equal."""

_OTHER_LOG_PROBS = (
    "The stored log-probabilities are not those of the stored means under the kernel's noise. Either the sampler stores others (zeros, "
    "another unit, those of another sampler), or it drew at another noise level than the trajectory records."
)


@attrs.frozen(eq=False)
class Call:
    """Network call of a rollout, with all that is needed to repeat it.

    Args:
        trajectories: the forest
        edges: the edges that go out from the rows of the call
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
        """Condition of the parents, U rows. It is large, and needed only if something is wrong."""
        return self.trajectories.condition.select(self.edges.prompts)

    @cached_property
    def eta(self) -> Tensor:
        """[U]."""
        return self.trajectories.noise_level[self.edges.child[self.edges.first]]

    @property
    def rollout(self) -> Tensor:
        """Means of the rollout: [E, *]."""
        return self.trajectories.mean[self.edges.row].detach()

    def sigma(self, shift: int = 0) -> Tensor:
        """Sigma of each parent, or the sigma that is `shift` places further on the grid: [U]."""
        sigmas = self.trajectories.sigmas
        return sigmas[(self.level + shift).clamp(0, len(sigmas) - 1)]

    def velocity(self, policy: Policy, shift: int = 0) -> Tensor:
        """Velocity of a policy at the parents, with the sigma `shift` places further: [U, *]."""
        return policy.velocity(self.latents, self.sigma(shift), self.condition)

    def mean(self, policy: Policy, velocity: Tensor, factor: float = 1.0) -> Tensor:
        """Mean of the step that a velocity gives, with the noise level multiplied by `factor`: [U, *]."""
        return policy.kernel.step(self.latents, velocity, self.sigma(), self.sigma(1), self.eta * factor).mean

    def repeat(self, policy: Policy) -> Gaussian:
        """Transition under the present weights: mean [U, *], std [U]."""
        return replay_parents(policy, self.trajectories, self.edges)

    def lengths(self, policy: Policy, means: Tensor) -> Tensor:
        """Length by which a deviation is divided: the velocity's part of the step, ||mean - (mean with velocity 0)||, [U], float64.

        A thousandth of ||mean|| is added, so that velocities near 0 do not divide by 0.
        """
        part = means - self.mean(policy, torch.zeros_like(means))
        return (_norm(part) + 1e-3 * _norm(means)).clamp(min=1e-30)


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values.flatten(1).double(), dim=1)
    return norm


@attrs.frozen(eq=False)
class Suspicion:
    """Network call that was repeated, and how far it is from the rollout.

    Args:
        policy: the policy as it is now
        call: the call that was repeated
        now: [U, *] means that the repetition gave
        lengths: [U] lengths by which deviations are divided
        deviation: [E] deviation of the means from those of the rollout
        noise: [E] relative difference between the stored log-probability and the log-probability under the stored mean
    """

    policy: Policy
    call: Call
    now: Tensor
    lengths: Tensor
    deviation: Tensor
    noise: Tensor

    @classmethod
    def of(cls, policy: Policy, call: Call) -> "Suspicion":
        """Repeat a call and compare it with the rollout."""
        edges, trajectories, rollout = call.edges, call.trajectories, call.rollout
        with torch.set_grad_enabled(trajectories.mean.requires_grad):  # attention may take another kernel where there is a gradient
            again = call.repeat(policy)
        again = attrs.evolve(again, mean=again.mean.detach())
        lengths = call.lengths(policy, again.mean)
        deviation = _norm(rollout - again.mean[edges.owner]) / lengths[edges.owner]
        # once the mean is given, the log-density depends only on the noise: no network is evaluated, so nothing is rounded
        said = trajectories.log_prob[edges.child]
        given = attrs.evolve(again.select(edges.owner), mean=rollout).log_prob(trajectories.latents[edges.child])
        return cls(policy, call, again.mean, lengths, deviation, (given - said).abs() / (1 + said.abs()))

    @property
    def means_agree(self) -> bool:
        """True if only log-probabilities differ from those of the rollout: no other call of the policy explains that."""
        return float(self.deviation.max()) <= _EQUAL

    @property
    def worst(self) -> float:
        """Largest deviation; NaN if one of them is NaN."""
        return float(torch.stack([self.deviation.max(), self.noise.max()]).max())

    def against(self, means: Tensor) -> float:
        """Largest deviation of the repetition from other means [U, *] of the same policy."""
        return float((_norm(means - self.now) / self.lengths).max())

    def left_by(self, means: Tensor) -> float:
        """Share of the deviation that would remain if the replay had given these means [U, *]."""
        owner = self.call.edges.owner
        left = _norm(self.call.rollout - means[owner]) / self.lengths[owner]
        return float(left.max() / self.deviation.max().clamp(min=1e-30))

    def address(self) -> tuple[int, float, float]:
        """Level of the worst edge, and the sigmas of its step."""
        worst = int(torch.maximum(self.deviation, self.noise).argmax())
        level, sigmas = int(self.call.level[self.call.edges.owner[worst]]), self.call.trajectories.sigmas
        return level, float(sigmas[level]), float(sigmas[level + 1])


def cause_of(suspicion: Suspicion) -> str:
    """Name the most probable fault in one or two sentences, after types, repetitions and batch shapes were found to be right."""
    return next(_guesses(suspicion))


def _guesses(suspicion: Suspicion) -> Iterator[str]:
    """Yield the explanations that fit, the surest first; at least one."""
    policy, call = suspicion.policy, suspicion.call
    if suspicion.means_agree:
        yield _OTHER_LOG_PROBS
    velocity = call.velocity(policy)
    factor, left = min(
        ((f / 100, suspicion.left_by(call.mean(policy, velocity, f / 100))) for f in range(50, 151)), key=lambda pair: pair[1]
    )
    if left < _FITS:
        yield (
            f"It looks like another noise level: the kernel gives the rollout's means at {factor:g} times the noise level that the "
            "trajectory records. Look for a plan, sampler, kernel or transition that changes it between rollout and replay."
        )
    if float(suspicion.noise.max()) > max(_EQUAL, float(suspicion.deviation.max())):
        yield _OTHER_LOG_PROBS
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
    """Guess that the guidance scale has changed: then the difference lies along (conditional - unconditional)."""
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
