"""Any objective, with a guard of the velocity's norm."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import Budgeted, Loss, Objective, Outline, Phase, Policy, Progress, ScoredBatch, UpdateRows

from .draws import GridDraws
from .forward import ForwardBatch
from .guards import NormGuard
from .noised import Noised
from .requirements import given_reference


@attrs.define(eq=False)
class NormGuarded(Objective):
    """Adds the penalty of `NormGuard` to the losses of another objective, over paths or over ends.

        loss = that of the objective + mean over noised ends of guard.penalty(v_theta, v_ref)

    The penalty takes a network row of the policy and one of the reference for each noise level of a sample, beside those of the objective.
    It compares no samples, so one of a prompt is enough where the objective takes that.
    It is written in Python, `NormGuarded(SoftmaxTB(policy))`: a run file names one objective.

    Args:
        objective: objective whose policy is guarded; its phases that train the policy get the penalty
        guard: penalty of long velocities
        reference: frozen; by default a fork of the policy as it is when the objective is built
        levels: noise levels per sample and update
        sigma_min: least noise level that is drawn from the rollout's grid
        rows: network rows per micro-batch, of the penalty and of the objective; None takes all at once, and leaves the objective its own

    Raises:
        ValueError: a number is out of range, the reference is trainable, or the grid has too few noise levels.

    Reference: NormGuard, arXiv:2606.27771.
    """

    objective: Objective
    guard: NormGuard = attrs.field(factory=NormGuard)
    reference: Policy | None = None
    levels: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    sigma_min: float = attrs.field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    policy: Policy = attrs.field(init=False, repr=False)
    _draws: GridDraws = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.policy = self.objective.policy
        self.reference = given_reference(self.policy, self.reference)
        self._draws = GridDraws(self.levels, self.sigma_min, shared=False)

    def phases(self) -> tuple[Phase, ...]:
        return tuple(self._guarded(phase) for phase in self.objective.phases())

    def _guarded(self, phase: Phase) -> Phase:
        def losses(batch: ScoredBatch, update: int) -> Iterator[Loss]:
            if self.rows is not None and isinstance(self.objective, Budgeted):
                self.objective.rows = self.rows  # type: ignore[misc]  # the loop has lowered this field, which it knows alone
            yield from phase.losses(batch, update)
            if self._trains(phase):
                forward = ForwardBatch(self._draws(batch, f"norm_guard/{update}", "NormGuarded"), self.rows)
                yield from forward.apart(lambda noised, units: self._penalty(forward, noised, units))

        return attrs.evolve(phase, losses=losses)

    def _trains(self, phase: Phase) -> bool:
        return any(policy is self.policy for policy in phase.trains.values())

    def _penalty(self, forward: ForwardBatch, noised: Noised, units: Tensor) -> Loss:
        assert self.reference is not None
        with torch.no_grad():
            reference = noised.velocity(self.reference)
        velocity = noised.velocity(self.policy)
        excess = self.guard.excess(velocity.detach(), reference)
        forward.samples.require_finite(excess, units, "policy, or of its reference,")
        value, count = (forward.weight[units] * self.guard.penalty(velocity, reference)).sum(), torch.tensor(len(units))
        return Loss(value, {"norm/excess": (excess.sum(), count), "norm/penalty": forward.reported(value, len(units))})

    def behavior(self) -> Policy:
        return self.objective.behavior()

    def policies(self) -> Mapping[str, Policy]:
        assert self.reference is not None
        return {**self.objective.policies(), "norm_reference": self.reference}

    def require(self, outline: Outline) -> None:
        self.objective.require(outline)
        self._draws.require(outline, "NormGuarded")

    def update_rows(self, samples: int, parents: int) -> int | None:
        own = self.objective.update_rows(samples, parents)
        return None if own is None else own + samples * self._draws.units

    def step_rows(self, outline: Outline) -> UpdateRows | None:
        own, guarded = self.objective.step_rows(outline), outline.samples * self._draws.units
        updates = sum(phase.repeats for phase in self.phases() if self._trains(phase))
        return None if own is None else own + UpdateRows((guarded,), (guarded,)) * updates

    def after_update(self, role: str) -> None:
        self.objective.after_update(role)

    def after_step(self) -> None:
        self.objective.after_step()

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        return self.objective.observe(metrics, progress)

    def state(self) -> Mapping[str, Any]:
        return self.objective.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.objective.restore(state)
