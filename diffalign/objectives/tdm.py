"""Trajectory Distribution Matching: distils a many-step teacher into a few-step student, without images."""

from collections.abc import Iterator, Mapping

import attrs
import torch

from diffalign.core import Loss, Objective, Outline, Phase, Policy, ScoredBatch, UpdateRows
from diffalign.core.words import allowed_word

from .few_step.directions import Distance, Huber, Normalizer, PerTerm, pull
from .few_step.fake_targets import CleanTarget, FakeTarget
from .few_step.intervals import Interval, Overlap
from .few_step.matching import Predictor, Queries, Shared, evaluated_by_fake, fake_losses, random_ends, scale_of
from .few_step.query_times import QueryTime, ShiftedTime
from .few_step.roles import conditions, frozen_teacher, moving_fork, unguided
from .few_step.stage_samplers import EveryStage, StageSampler
from .few_step.stages import Rows
from .few_step.update_plans import InOrder, Role, UpdatePlan, evaluated_in
from .noising import diffuse, mean_over_dimensions


@attrs.define(eq=False)
class TrajectoryDistributionMatching(Objective):
    """Matches the noised distribution of every stage's end to the teacher's: sum_j E_tau KL(p_student,j(x_tau) || p_teacher(x_tau)).

        x_tau = a x_{j+1} + b e,    D = f_psi^g(x_tau, c) - f_fake(x_tau, c),    w = mean |xhat0_j - f_psi^g(x_tau, c)|
        generator:  distance(xhat0_j - stopgrad(xhat0_j + D)) / w
        fake:       its own regression on the student's noised ends (see `FakeTarget`)

    with f the clean predictions and g the teacher's guidance. It needs deterministic trajectories with every level stored. It uses
    prompts only, no images; rewards are only logged.

    Args:
        policy: the student, a `TDMPolicy`
        teacher: frozen; None takes the student's policy without its LoRA update. A `Guided` teacher counts as the policy inside with its
            scale as `guidance`: the generator follows the guided prediction, the fake starts from the plain one and is kept near it
        fake: None takes a trainable fork of the unguided teacher. It reads the teacher's condition, or the student's if the student serves
            several numbers of steps
        guidance: scale g of the teacher's classifier-free guidance, as its family defines it; None means no guidance. The fake is never
            guided
        negative: the negative prompt of the guidance
        interval: interval of noise levels in which a stage is compared
        times: distribution of taus within the interval
        shared: rows that share one tau: all rows of the step ("batch"), those of a group ("group"), or none ("sample")
        fake_target: target of the fake's regression
        fake_regularization: weight of mean ||v_fake - v_psi||^2, v_psi not guided
        distance: distance of the generator's regression
        normalizer: the weight w
        stages: stages that a step trains
        random_end: end stages at a uniform sigma in [s_{j+1}, s_j - random_end), held where `times` has room above it; None ends them at
            the grid
        plan: order and number of optimizer steps of the roles "fake" and "generator"
        rows: rows per micro-batch; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: the teacher is trainable, the scale is below that of no guidance, a stage has no noise level at which it can be
            compared, or the batch does not store all levels.

    Reference: Luo et al., TDM, arXiv:2503.06674.
    """

    policy: Policy
    teacher: Policy | None = None
    fake: Policy | None = None
    guidance: float | None = None
    negative: str = ""
    interval: Interval = attrs.field(factory=Overlap)
    times: QueryTime = attrs.field(factory=ShiftedTime)
    shared: Shared = attrs.field(default="sample", validator=allowed_word)
    fake_target: FakeTarget = attrs.field(factory=CleanTarget)
    fake_regularization: float = attrs.field(default=0.0, validator=attrs.validators.ge(0.0))
    distance: Distance = attrs.field(factory=Huber)
    normalizer: Normalizer = attrs.field(factory=PerTerm)
    stages: StageSampler = attrs.field(factory=EveryStage)
    random_end: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0.0)))
    plan: UpdatePlan = attrs.field(factory=InOrder)
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _teacher: Policy = attrs.field(init=False, repr=False)
    _start: Policy = attrs.field(init=False, repr=False)
    _fake: Policy = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._teacher = self.teacher = frozen_teacher(self.policy, self.teacher)
        self._start = unguided(self._teacher)
        self._fake = self.fake = moving_fork(self._start, self.fake, "fake", self.policy)
        self.guidance = scale_of(self.guidance, self._teacher, "TrajectoryDistributionMatching.guidance")

    def phases(self) -> tuple[Phase, ...]:
        return self.plan.phases(self.roles())

    def roles(self) -> dict[str, Role]:
        """Return the trained roles and their losses, for objectives that add to them."""
        return {"fake": Role(self._fake, self._fake_losses), "generator": Role(self.policy, self._generator_losses)}

    def policies(self) -> Mapping[str, Policy]:
        return {"generator": self.policy, "fake": self._fake, "teacher": self._teacher}

    def require(self, outline: Outline) -> None:
        for sigmas in outline.grids:
            self._queries.require(sigmas, self.stages.possible(len(sigmas) - 1), "TrajectoryDistributionMatching")

    def step_rows(self, outline: Outline) -> UpdateRows:
        rows = round(outline.samples * self.stages.expected(outline.stages))
        aims = Predictor(self._teacher, self.guidance, self.negative).calls + Predictor(self._fake).calls
        generator = UpdateRows((rows,), (rows,) * aims)
        fake = evaluated_by_fake(rows, self.fake_regularization, outline)
        return evaluated_in(self.phases(), {"fake": fake, "generator": generator})

    @property
    def _queries(self) -> Queries:
        return Queries(self.interval, self.times, shared=self.shared)

    def _rows(self, batch: ScoredBatch, update: int) -> Rows:
        stages = len(batch.trajectories.sigmas) - 1
        rows = Rows.of(batch.trajectories, self.stages.draw(stages, batch.streams.generator("few_step/stages", update)))
        if self.random_end is not None:
            latest = self.times.latest(self._queries.top(rows.sigma, rows.first))
            rows = random_ends(rows, batch.streams, f"few_step/{update}", self.random_end, latest)
        return rows

    def _fake_losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        rows = self._rows(batch, update)
        if len(batch.trajectories.stochastic):  # stochastic edges are not steps of the student
            rows = rows.replayed(self.policy, batch.trajectories.condition, self.rows)
        read = conditions(self.policy, self._teacher, batch.trajectories.condition)
        drawn = self._queries(rows, batch.streams, f"fake/{update}")
        yield from fake_losses(
            self._fake, self._start, rows, read, drawn, self.fake_target, self.fake_regularization, batch.groups, self.rows
        )

    def _generator_losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        rows = self._rows(batch, update)
        told, plain = conditions(self.policy, self._teacher, batch.trajectories.condition)
        drawn = self._queries(rows, batch.streams, f"generator/{update}")
        teacher = Predictor(self._teacher, self.guidance, self.negative)
        for index in rows.pieces(self.rows):
            some = rows.select(index)
            asked = told.select(some.prompt)
            end, clean = some.replay(self.policy, batch.trajectories.condition)
            with torch.no_grad():
                tau, noise = drawn[0][index], drawn[1][index]
                noised = diffuse(end, some.sigma_end, tau, noise)
                aim = teacher(noised, tau, plain.select(some.prompt))[1]
                direction = aim - Predictor(self._fake)(noised, tau, asked)[0]
                divisor = self.normalizer(clean, {"kl": aim})["kl"]
            value = (pull(clean, direction, self.distance) / divisor * some.share).sum() / batch.groups
            count = torch.tensor(len(index))
            size = mean_over_dimensions(direction.square()).sqrt()
            yield Loss(value, {"generator/kl": (size.sum(), count), "generator/w": (divisor.detach().sum(), count)})
