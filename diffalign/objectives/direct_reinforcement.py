"""Distillation and a group loss of the rewards on the same weights: what TDM-R1 does without its surrogate."""

from collections.abc import Iterator, Mapping

import attrs

from diffalign.core import Loss, Objective, Outline, Phase, Policy, Scalar, ScoredBatch, UpdateRows

from .dgpo import DGPO, RECENT
from .few_step.directions import Distance, Squared
from .few_step.fake_targets import CleanTarget, FakeTarget
from .few_step.intervals import Interval, Overlap
from .few_step.query_times import QueryTime, ShiftedTime
from .few_step.stage_samplers import EveryStage, StageSampler
from .few_step.update_plans import Role, Together, UpdatePlan
from .tdm import TrajectoryDistributionMatching


@attrs.define(eq=False)
class DirectReinforcement(Objective):
    """Adds DGPO's loss on the student itself to its distillation: "TDM and direct RL" of the ablation in the TDM-R1 paper.

        L(generator) = L_TDM(generator) + weight L_DGPO(generator),        the fake as in distillation

    DGPO's loss is a regression on noised samples of the student, so the student also learns what blurs them; `SurrogateReward` keeps that
    regression on other weights.

    Args:
        policy: the student, a `TDMPolicy`
        teacher, fake, guidance, negative, interval, times, fake_target, fake_regularization, distance, stages, plan: see
            `TrajectoryDistributionMatching`; the distance and the plan are by default those of `SurrogateReward`
        weight: weight of DGPO's loss, > 0
        reference, beta, clip, decay, kl, sigma_min: see `DGPO`; without a reference it is the student at the start
        levels: noise levels per prompt and update, as in `DGPO`. By default 2 instead of 4, because few of a student's levels are as large
            as sigma_min: three of four even steps
        rows: rows per micro-batch of each loss; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: what either of the two refuses, a weight that is not positive.

    Reference: TDM-R1, arXiv:2603.07700; TDM, arXiv:2503.06674; DGPO, arXiv:2510.08425.
    """

    policy: Policy
    teacher: Policy | None = None
    fake: Policy | None = None
    guidance: float | None = None
    negative: str = ""
    interval: Interval = attrs.field(factory=Overlap)
    times: QueryTime = attrs.field(factory=ShiftedTime)
    fake_target: FakeTarget = attrs.field(factory=CleanTarget)
    fake_regularization: float = 0.02
    distance: Distance = attrs.field(factory=Squared)
    stages: StageSampler = attrs.field(factory=EveryStage)
    plan: UpdatePlan = attrs.field(factory=Together)
    weight: float = attrs.field(default=1.0, validator=attrs.validators.gt(0.0))
    reference: Policy | None = None
    beta: float = 100.0
    clip: float | None = 1e-2
    decay: Scalar | float = RECENT
    kl: float = 0.001
    levels: int = 2
    sigma_min: float = 0.5
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _parts: tuple[TrajectoryDistributionMatching, DGPO] = attrs.field(init=False, repr=False)
    """A pair, because a field with rows of its own would be built anew when the row budget is halved."""

    def __attrs_post_init__(self) -> None:
        matching = TrajectoryDistributionMatching(
            self.policy,
            self.teacher,
            self.fake,
            guidance=self.guidance,
            negative=self.negative,
            interval=self.interval,
            times=self.times,
            fake_target=self.fake_target,
            fake_regularization=self.fake_regularization,
            distance=self.distance,
            stages=self.stages,
            plan=self.plan,
        )
        preference = DGPO(
            self.policy,
            self.reference,
            beta=self.beta,
            clip=self.clip,
            decay=self.decay,
            kl=self.kl,
            levels=self.levels,
            sigma_min=self.sigma_min,
        )
        forward, name = preference._forward, type(self).__name__  # messages name the class that was asked for
        follower = attrs.evolve(forward.follower, name=f"{name}.decay")
        preference._forward = attrs.evolve(forward, objective=name, follower=follower)
        self.teacher, self.fake, self.guidance, self.reference = matching.teacher, matching.fake, matching.guidance, preference.reference
        self._parts = matching, preference

    def phases(self) -> tuple[Phase, ...]:
        fake, generator = (self._parts[0].roles()[name] for name in ("fake", "generator"))
        return self.plan.phases(
            {
                "fake": Role(fake.policy, lambda batch, update: self._within_budget(fake, batch, update)),
                "generator": Role(self.policy, lambda batch, update: self._generator_losses(generator, batch, update)),
            }
        )

    def behavior(self) -> Policy:
        return self._parts[1].behavior()

    def policies(self) -> Mapping[str, Policy]:
        matching, preference = (part.policies() for part in self._parts)
        return {**matching, **{name: policy for name, policy in preference.items() if name != "policy"}}

    def require(self, outline: Outline) -> None:
        matching, preference = self._parts
        matching.require(outline)
        self._require_levels(outline)
        preference.require(outline)

    def step_rows(self, outline: Outline) -> UpdateRows:
        rows = outline.samples * self.levels
        preferred = UpdateRows((rows,), (rows,) * (1 + (self.clip is not None)), compared=(rows,))  # the reference, and old weights
        updates = sum(phase.repeats for phase in self.phases() if "generator" in phase.trains)
        return self._parts[0].step_rows(outline) + preferred * updates

    def after_step(self) -> None:
        self._parts[1].after_step()

    def _require_levels(self, outline: Outline) -> None:
        """Check what `DGPO.require` checks, without the advice to take more steps, whose number the student sets."""
        for grid in outline.grids:
            high = int((grid[:-1] >= self.sigma_min).sum())
            if high < self.levels:
                raise ValueError(
                    f"{type(self).__name__}.levels must be at most the number of noise levels of the student from sigma_min "
                    f"{self.sigma_min:g} on, {high} of its {len(grid) - 1}; got {self.levels}. Take fewer levels or a lower sigma_min."
                )

    def _within_budget(self, role: Role, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        self._parts[0].rows = self.rows
        yield from role.losses(batch, update)

    def _generator_losses(self, role: Role, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        yield from self._within_budget(role, batch, update)
        preference = self._parts[1]
        preference.rows = self.rows
        for loss in preference.losses(batch, update):
            yield Loss(self.weight * loss.value, {f"preference/{name}": metric for name, metric in loss.metrics.items()})
