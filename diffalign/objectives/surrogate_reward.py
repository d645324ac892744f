"""TDM-R1: few-step students reinforced by rewards that have no gradient, through a surrogate that has one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import attrs
from attrs import validators
from torch import Tensor

from diffalign.core import Condition, Follower, Loss, Objective, Outline, Phase, Policy, Progress, Ramp, Scalar, ScoredBatch, UpdateRows
from diffalign.core.words import allowed_word

from .few_step.advantages import Advantage, GroupAdvantage
from .few_step.attribution import Attribution, Broadcast
from .few_step.directions import Distance, GeneratorMix, Normalizer, PerTerm, ShareMix, Squared
from .few_step.fake_targets import CleanTarget, FakeTarget
from .few_step.group_objectives import GroupObjective, SigmoidWeighted
from .few_step.intervals import Interval, Overlap
from .few_step.matching import Predictor, Queries, Shared, evaluated_by_fake, fake_losses, scale_of
from .few_step.query_times import QueryTime, ShiftedTime
from .few_step.reach import Reach, is_largest_sigma, is_least_sigma, weights_of_stages
from .few_step.references import FrozenTeacher, Reference
from .few_step.reinforcing import Reinforcement, reinforce
from .few_step.roles import Beside, conditions
from .few_step.stage_samplers import CleanerStages, EveryStage, StageSampler
from .few_step.stages import DrawnBy, Rows, drawn_rows
from .few_step.surrogate import evaluated_by_surrogate, prefer, regress
from .few_step.trust_regions import RatioClip, TrustRegion
from .few_step.update_plans import Role, Together, UpdatePlan, evaluated_in
from .requirements import require_groups, require_several

_OLD_DECAY = Ramp(0.001, 0.001, limit=0.3)


@attrs.define(eq=False)
class SurrogateReward(Objective):
    """Teaches a surrogate diffusion model which states the reward prefers, and moves the student along its difference to a reference.

    On a deterministic trajectory the reward of the sample is the value of every state on the way, so its advantage A is broadcast.

        surrogate:  d_i = mean ||v*_i - v_phi(x_tau,i)||^2 for ends x_{j+1} noised with one noise and one tau for a whole group, v* the
                    exact velocity of that noising; a group loss of A_i and d_i - d_ref,i (see `GroupObjective`), weighted (j + 1) / K,
                    with a trust region against a moving average of the surrogate
        fake:       regression on the student's noised ends, as in distillation
        generator:  l(D_rl, w_rl), l(D_cfg, w) and l(D_kl, w) in the proportions of `GeneratorMix`, with l(D, w) = distance(D) / w,
                    D_rl = f_phi^rl_cfg - f_base,  D_cfg = f_psi^g - f_psi,  D_kl = f_psi - f_fake,
                    w_rl = mean |xhat0 - f_phi^rl_cfg|,  w = mean |xhat0 - f_psi^g|

    In a group whose rewards are all equal the group loss and its gradient are exactly zero (`RewardWeighted`: those of the reference).

    Args:
        policy: the student, a `TDMPolicy`
        teacher: frozen; None takes the student's policy without its LoRA delta. A `Guided` one is guided in the generator's terms "kl" and
            "guidance" alone: `FrozenTeacher` and the regularizations mean the policy inside, which surrogate and fake start from
        fake, surrogate: None takes a trainable fork of the unguided teacher
        guidance: g of the guidance that serves as a reward; None leaves it out
        reward_guidance: rl_cfg of the surrogate in D_rl; None is none; with any it pulls before anything is learned
        negative: the negative prompt of both
        advantage: rewards of a group -> advantages
        attribution: advantages of samples -> of their states
        group_objective: loss by which the surrogate learns from a group
        reference: p_ref of the surrogate's density ratio
        baseline: f_base of the generator's direction: the teacher, as released, so that all that
            the surrogate has learned counts. Equal rules share one policy
        trust_region: against the moving average of the surrogate
        old_decay: its share of itself at a step, in [0, 1]; a number or a schedule, by default 0.001 (n + 1) at step n up to 0.3
        runaway: mean ||v_phi - v_psi||^2 of a group beyond which its samples that beat the reference stop pulling; None never
        surrogate_regularization: weight of that distance, v_psi not guided
        weight_by_stage: the factor (j + 1) / K
        fake_target, fake_regularization: see `TrajectoryDistributionMatching`
        mix: proportions of the generator's terms
        distance, normalizer: form of the generator's regression
        interval: interval of tau of the fake and the generator's other terms
        reward_interval: interval of tau of the surrogate and the reward term
        times, shared: draw of the taus, and rows that share one; the surrogate shares it at least in a group
        reward_floor, reward_ceiling: bounds of the reward term's taus; it does not reach stages whose ends are not below the latter
        surrogate_floor, surrogate_ceiling: bounds of the taus of the surrogate's training
        reward_stages, reward_weights: the reward term reaches stages below this number, with a factor for each stage; None is all and 1
        stages, surrogate_stages: stages of fake and generator, and of the surrogate
        plan: when the roles step, one phase (as released) or three (`InOrder`, the paper's); a trained reference comes first
        rows: rows of a micro-batch, which change no gradient; None takes all
        stages_by: stages are drawn once for a "step", or anew for each "prompt", as in the release's micro-batches, at no row more
        reward_noise: noise of the generator's reward term, one for a "group", as released, or a "sample"; the surrogate always shares one

    Raises:
        ValueError: a movable teacher, fewer than two samples for a prompt, stochastic trajectories under `Broadcast`, a number
            out of range, bounds without room between them, a scale below that of no guidance, a trained baseline that is not the
            reference.

    Reference: TDM-R1, arXiv:2603.07700; DGPO, arXiv:2510.08425.
    """

    policy: Policy
    teacher: Policy | None = None
    fake: Policy | None = None
    surrogate: Policy | None = None
    guidance: float | None = None
    reward_guidance: float | None = None
    negative: str = ""
    advantage: Advantage = attrs.field(factory=GroupAdvantage)
    attribution: Attribution = attrs.field(factory=Broadcast)
    group_objective: GroupObjective = attrs.field(factory=SigmoidWeighted)
    reference: Reference = attrs.field(factory=FrozenTeacher)
    baseline: Reference = attrs.field(factory=FrozenTeacher)
    trust_region: TrustRegion = attrs.field(factory=RatioClip)
    old_decay: Scalar | float = _OLD_DECAY
    runaway: float | None = attrs.field(default=0.05, validator=validators.optional(validators.gt(0.0)))  # type: ignore[arg-type]
    surrogate_regularization: float = attrs.field(default=1e-3, validator=validators.ge(0.0))
    weight_by_stage: bool = True
    fake_target: FakeTarget = attrs.field(factory=CleanTarget)
    fake_regularization: float = attrs.field(default=0.02, validator=validators.ge(0.0))
    mix: GeneratorMix = attrs.field(factory=ShareMix)
    distance: Distance = attrs.field(factory=Squared)
    normalizer: Normalizer = attrs.field(factory=PerTerm)
    interval: Interval = attrs.field(factory=Overlap)
    reward_interval: Interval = attrs.field(factory=Overlap)
    times: QueryTime = attrs.field(factory=ShiftedTime)
    shared: Shared = attrs.field(default="group", validator=allowed_word)
    reward_floor: float = attrs.field(default=0.3, validator=is_least_sigma)
    surrogate_floor: float = attrs.field(default=0.3, validator=is_least_sigma)
    reward_stages: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(0)))
    stages: StageSampler = attrs.field(factory=EveryStage)
    surrogate_stages: StageSampler = attrs.field(factory=CleanerStages)
    plan: UpdatePlan = attrs.field(factory=Together)
    rows: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    stages_by: DrawnBy = attrs.field(default="step", validator=allowed_word)
    reward_noise: Literal["group", "sample"] = attrs.field(default="group", validator=allowed_word)
    reward_weights: Sequence[float] | None = attrs.field(default=None, converter=weights_of_stages)
    reward_ceiling: float = attrs.field(default=1.0, validator=is_largest_sigma)
    surrogate_ceiling: float = attrs.field(default=1.0, validator=is_largest_sigma)
    _beside: Beside = attrs.field(init=False, repr=False)
    _progress: Progress | None = attrs.field(init=False, default=None, repr=False)
    """Progress of the step; None between steps."""

    def __attrs_post_init__(self) -> None:
        self._beside = Beside.of(self.policy, self.teacher, self.fake, self.surrogate, self.reference, self.baseline)
        self.teacher, self.fake, self.surrogate = self._beside.teacher, self._beside.fake, self._beside.surrogate
        self.guidance = scale_of(self.guidance, self._beside.teacher, "SurrogateReward.guidance")
        self.reward_guidance = scale_of(self.reward_guidance, self._beside.surrogate, "SurrogateReward.reward_guidance")

    def phases(self) -> tuple[Phase, ...]:
        trained = {"reference": Role(self._beside.reference, self._reference_losses)} if self.reference.trained else {}
        return self.plan.phases(
            {
                **trained,
                "surrogate": Role(self._beside.surrogate, self._surrogate_losses),
                "fake": Role(self._beside.fake, self._fake_losses),
                "generator": Role(self.policy, self._generator_losses),
            }
        )

    def policies(self) -> Mapping[str, Policy]:
        return {"generator": self.policy, **self._beside.policies()}

    def require(self, outline: Outline) -> None:
        require_several(outline, "SurrogateReward")
        for sigmas in outline.grids:
            trained, compared = (sampler.possible(len(sigmas) - 1) for sampler in (self.stages, self.surrogate_stages))
            self._near.require(sigmas, trained, "SurrogateReward")
            self._far.require(sigmas, self._reach.among(sigmas, trained), "SurrogateReward's reward term")
            self._comparing.require(sigmas, compared, "SurrogateReward's surrogate")

    def step_rows(self, outline: Outline) -> UpdateRows:
        compared, moved = (round(outline.samples * some.expected(outline.stages)) for some in (self.surrogate_stages, self.stages))
        reached = round(outline.samples * self.stages.expected(outline.stages, self._reach.among(outline.sigmas, range(outline.stages))))
        by_role = {
            "reference": UpdateRows((compared,)),
            "surrogate": evaluated_by_surrogate(compared, self._beside, self.trust_region),
            "fake": evaluated_by_fake(moved, self.fake_regularization, outline),
            "generator": self._reinforcement.evaluated(reached, moved - reached),
        }
        return evaluated_in(self.phases(), by_role)

    def after_step(self) -> None:
        # once all phases have succeeded, so that a failure leaves nothing half moved
        progress, self._progress = self._progress, None
        if progress is None:
            return
        self._follower.move(self._beside.old, self._beside.surrogate, progress)
        self.reference.follow(self._beside.reference, self._beside.surrogate, progress)
        if self._beside.baseline is not self._beside.reference:
            self.baseline.follow(self._beside.baseline, self._beside.surrogate, progress)

    @property
    def _follower(self) -> Follower:
        return Follower(self.old_decay, name="SurrogateReward.old_decay")

    def _rows(self, batch: ScoredBatch, sampler: StageSampler, name: str) -> Rows:
        return drawn_rows(batch.trajectories, sampler, batch.streams, name, self.stages_by)

    def _conditions(self, batch: ScoredBatch) -> tuple[Condition, Condition]:
        return conditions(self.policy, self._beside.teacher, batch.trajectories.condition)

    @property
    def _near(self) -> Queries:
        return Queries(self.interval, self.times, shared=self.shared)

    @property
    def _far(self) -> Queries:
        return Queries(self.reward_interval, self.times, self.reward_floor, self.shared, self.reward_noise == "group", self.reward_ceiling)

    @property
    def _comparing(self) -> Queries:
        shared: Shared = "batch" if self.shared == "batch" else "group"
        return Queries(self.reward_interval, self.times, self.surrogate_floor, shared, noise_by_group=True, ceiling=self.surrogate_ceiling)

    @property
    def _reinforcement(self) -> Reinforcement:
        return Reinforcement(
            student=self.policy,
            teacher=Predictor(self._beside.teacher, self.guidance, self.negative),
            fake=Predictor(self._beside.fake),
            surrogate=Predictor(self._beside.surrogate, self.reward_guidance, self.negative),
            baseline=Predictor(self._beside.baseline),
            mix=self.mix,
            distance=self.distance,
            normalizer=self.normalizer,
        )

    @property
    def _reach(self) -> Reach:
        return Reach(self.reward_stages, self.reward_weights, self.reward_ceiling)

    def _compared(self, batch: ScoredBatch, update: int) -> tuple[Rows, tuple[Tensor, Tensor], Tensor]:
        """Rows at which surrogate and reference are compared, their taus and noises, and weights [B]."""
        rows = self._rows(batch, self.surrogate_stages, f"surrogate/{update}/stages")
        return rows, self._comparing(rows, batch.streams, f"surrogate/{update}"), rows.weights(self.weight_by_stage, batch)

    def _reference_losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        yield from regress(self._beside.reference, *self._compared(batch, update), self._conditions(batch)[1], self.rows)

    def _surrogate_losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        require_groups(batch.trajectories, "SurrogateReward")
        self._follower.kept(batch.progress)  # refuse an impossible decay before a weight moves
        self._progress = batch.progress
        rows, drawn, weight = self._compared(batch, update)
        values = self.attribution(batch.trajectories, self.advantage(batch.rewards, batch.trajectories.group, batch.deviation))
        yield from prefer(
            self._beside,
            rows,
            self._conditions(batch)[1],
            drawn,
            values[rows.sample, rows.stage].to(rows.sigma.dtype),
            weight,
            self.group_objective,
            self.trust_region,
            self.runaway,
            self.surrogate_regularization,
            self.rows,
        )

    def _fake_losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        rows = self._rows(batch, self.stages, f"few_step/{update}/stages")
        if len(batch.trajectories.stochastic):  # the stored ends are no steps of the student
            rows = rows.replayed(self.policy, batch.trajectories.condition, self.rows)
        read, drawn = self._conditions(batch), self._near(rows, batch.streams, f"fake/{update}")
        fake, start = self._beside.fake, self._beside.start
        yield from fake_losses(fake, start, rows, read, drawn, self.fake_target, self.fake_regularization, batch.groups, self.rows)

    def _generator_losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        rows = self._rows(batch, self.stages, f"few_step/{update}/stages")
        roles, name = self._reinforcement, f"generator/{update}"
        read = (batch.trajectories.condition, *self._conditions(batch))
        for some, reached, factor in self._reach.split(rows, len(batch.trajectories.sigmas) - 1):
            drawn = self._near(some, batch.streams, name), self._far(some, batch.streams, f"{name}/reward") if reached else None
            yield from reinforce(roles, some, read, *drawn, factor, batch.groups, self.rows)
