"""Training loop: roll out, score, aggregate within the group, run each phase of the objective."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from .average import Average
from .budget import limited, shrink
from .contract import check_first_step, due, refuse_dropout
from .demands import reach
from .errors import Evidence, NonFiniteError
from .given import (
    RUN,
    optimizers_of,
    prompts_of,
    refuse_kept,
    require_fit,
    require_numbers,
    require_parts,
    require_roles,
    require_steps,
    trainable,
    usual,
)
from .groups import Raw
from .interfaces import Aggregation, Meter, Objective, OptimizerFactory, PromptSource, RewardFunction, TrajectorySampler
from .interrupt import StopRequest, stop_between_steps
from .learning_rates import adamw, scale_learning_rates
from .ledger import Ledger
from .outcome import Outcome
from .policy import Policy
from .processes import Devices, Free, Lockstep, Sharding, SingleProcess, together
from .report import Evaluated, Metrics, Report, deviation
from .rollout import Rollout, Sequential, Stages, share_of
from .schedule import Scalar
from .scores import Scores
from .scoring import hooks_of, named_rewards, rewards_by_source
from .streams import Streams
from .telling import end_all, start_all, step_all
from .types import Progress, Prompt, ScoredBatch, TrajectoryBatch
from .undo import rewind_of
from .unessential import say
from .update import Update, phases_of


class Hook:
    """Observer of a run. Every method has a default that does nothing.

    Hooks are called in their order, and no hook searches for another. A hook that evaluates appends its result to
    `loop.evaluations`. Hooks after it read it there in the same round of calls, those before it in the next.
    """

    def start(self, loop: "AlignmentLoop", step: int, total: int) -> None:
        """Act before the first step, or before the first step after a resume."""

    def step(self, loop: "AlignmentLoop", report: Report) -> None:
        """Act after each step."""

    def stop(self, loop: "AlignmentLoop", step: int, error: BaseException | None) -> None:
        """Act after the last step, or when the run ends by `error`. `step` steps are done."""


@attrs.define(eq=False)
class AlignmentLoop:
    """Aligns a policy. The order of a step: encode, sample, decode and score, aggregate, contract, phases.

    Losses are means over the global number of prompt groups. All gradients of a phase are computed and checked before any of its
    roles steps; if a later phase fails, everything is as it was when the step began. An error in one process stops all. If memory runs
    out, the row budget of all processes is halved and the step is repeated; this changes no result.

    Args:
        objective: losses that move the weights
        sampler: draws the trajectories
        rewards: a reward, or several by name; raw scores are logged by name
        prompts: their source; a list of texts is `Prompts` of them. A `Mixture` also says which rewards score which prompts
        aggregation: turns raw scores into the reward that the objective sees
        prompts_per_step: prompt groups of a step, over all processes
        optimizers: role -> factory, or a learning rate: AdamW, weight decay 1e-4. One alone is for all roles; a role that is not named
            gets the entry "default", or AdamW at 1e-4
        max_grad_norm: gradients are clipped to it per role; None leaves them
        lr_factor: factor on all learning rates, e.g. `Cosine(1.0, 0.05)`
        average: moving average of the policy for evaluation
        hooks: progress, metrics, checkpoints, evaluation
        devices: processes of the run
        seed: seed of random draws
        rollout: samples and scores, in turn or at once
        chunk: images decoded and scored at once
        check_rows: network rows a step for the first-step contract; None repeats all calls of the first rollout, then one at each of
            four steps and at every fifth; 0 checks none
        keep_images: images in a report
        folder: for files of hooks, or None
        sharding: shards weights; None keeps them whole
        meter: metrics of a step's time, as of `diffalign.costs.utilisation`, or None
    """

    objective: Objective
    sampler: TrajectorySampler
    rewards: RewardFunction | Mapping[str, RewardFunction]
    prompts: PromptSource = attrs.field(converter=prompts_of)
    aggregation: Aggregation = attrs.field(factory=Raw)
    prompts_per_step: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    optimizers: Mapping[str, OptimizerFactory] = attrs.field(factory=dict, converter=optimizers_of)
    max_grad_norm: float | None = attrs.field(default=1.0, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    lr_factor: Scalar | float = 1.0
    average: Average | None = None
    hooks: Sequence[Hook] = ()
    devices: Devices = attrs.field(factory=SingleProcess)
    seed: int = 0
    rollout: Rollout = attrs.field(factory=Sequential)
    chunk: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    check_rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    keep_images: int = attrs.field(default=16, validator=attrs.validators.ge(0))
    folder: Path | None = None
    sharding: Sharding | None = None
    meter: Meter | None = None
    ledger: Ledger = attrs.field(factory=Ledger, init=False)
    running: dict[str, torch.optim.Optimizer] = attrs.field(factory=dict, init=False)
    reward: float | None = attrs.field(default=None, init=False)
    evaluations: list[Evaluated] = attrs.field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        require_parts(self.objective, self.sampler, self.aggregation, self.hooks, Hook)
        require_numbers(self.lr_factor, self.average)
        self._rewards = rewards_by_source(named_rewards(self.rewards), self.prompts)
        phases = phases_of(self.objective)
        roles = [role for phase in phases for role in phase.trains]
        require_roles(self.optimizers, roles)
        if self.prompts_per_step < self.devices.size:
            raise ValueError(
                f"prompts_per_step must be at least {self.devices.size}, one for each process, because a prompt group is never split; got "
                f"{self.prompts_per_step}. Raise it, or start fewer processes."
            )
        if self.average is not None:
            self.average.start(self.objective.policy)
        self.lockstep = Free()
        self._update = Update(self.objective, phases, self.running, self.devices, self.lockstep, self.max_grad_norm, self._hold)
        if self.sharding is not None:  # all forks exist, no optimizer does
            refuse_kept(self.sampler)
            self.lockstep = self._update.lockstep = self.sharding.shard(self.policies(), self.devices)
        for role, policy in self.trained().items():
            parameters = trainable(role, policy)
            refuse_dropout(role, policy)
            self.running[role] = self.optimizers.get(role, self.optimizers.get("default", adamw))(parameters)
        require_fit(self.objective, self.sampler, self.prompts, (*self._rewards.values(), *self.hooks))

    _rewards: dict[str, RewardFunction] = attrs.field(init=False, repr=False)
    lockstep: Lockstep = attrs.field(init=False, repr=False)
    _update: Update = attrs.field(init=False, repr=False)
    _request: StopRequest = attrs.field(factory=StopRequest, init=False, repr=False)
    _observed: bool = attrs.field(default=False, init=False, repr=False)
    _checked: bool = attrs.field(default=False, init=False, repr=False)

    def trained(self) -> dict[str, Policy]:
        """Trained weights by role, of all phases."""
        return self._update.trained()

    def policies(self) -> dict[str, Policy]:
        """Every policy of the run by name: the objective's, and the average."""
        averaged = None if self.average is None else self.average.policy
        named = {**self.objective.policies(), **self.trained()}
        return named if averaged is None else {**named, "average": averaged}

    def named_rewards(self) -> dict[str, RewardFunction]:
        """The rewards by name, each held to its sources of prompts where there are several."""
        return dict(self._rewards)

    def reach(self) -> None:
        """Refuse servers that are not there, of any part. Nothing is scored.

        Raises:
            ConfigError: names one.
        """
        reach([*self._rewards.values(), self.sampler, *self.hooks])

    def evaluation_policy(self) -> Policy:
        """Policy to evaluate: the average if there is one, else the policy."""
        averaged = None if self.average is None else self.average.policy
        return self.objective.policy if averaged is None else averaged

    def run(
        self, total: int, start: int = 0, *, folder: str | Path | None = None, resume: bool = False, show: bool | None = None
    ) -> Outcome:
        """Do the steps `start` .. `total` - 1, and give what can be looked at.

        Args:
            total: steps of the run
            start: steps done
            folder: gets what `diffalign train` writes: metrics, checkpoints, pictures, LoRA with its card, report
            resume: go on from the folder's last checkpoint, if it has one
            show: progress, on stderr; None shows it on a terminal and in a notebook

        Raises:
            ValueError: the folder holds a run, and `resume` is not said.
            Interrupted: as `advance`.
        """
        return usual(RUN)(self, total, start, folder=folder, resume=resume, show=show)  # type: ignore[no-any-return]

    def advance(self, total: int, start: int = 0, also: Sequence[Hook] = ()) -> None:
        """Do the steps `start` .. `total` - 1, and nothing around them but hooks: the loop's, `also`, the rewards'.

        Raises:
            Interrupted: a process received SIGINT or SIGTERM, or `end` was called; the step was finished, and the hooks were stopped.
            RewardError: a reward failed.
        """
        require_steps(total, start)
        step = start
        self.evaluations.clear()
        own = hooks_of(self._rewards)
        hooks = (*self.hooks, *also, *own)
        with stop_between_steps(speaks=self.devices.rank == 0) as request:
            self._request = request
            try:
                start_all((*own, *self.hooks, *also), self, start, total)  # evaluations ask rewards
                request.honour(self.devices)
                for step in range(start, total):
                    request.step = step + 1
                    report = self.step(self.prompts.draw(step, self.prompts_per_step), Progress(step, total, self.reward))
                    step += 1  # noqa: PLW2901  steps done
                    request.finish()
                    step_all(hooks, self, report)
                    request.honour(self.devices)
            except BaseException as error:
                request.release()
                end_all(hooks, self, step, error)
                raise
            end_all(hooks, self, step, None)

    def end(self) -> None:
        """End the run under way, if any, after a step that all hooks still see."""
        self._request.ask()

    @property
    def settled(self) -> bool:
        """True if no weight has moved since the last step."""
        return not self._request.moving

    def _hold(self) -> None:
        self._request.hold()

    def step(self, prompts: Sequence[Prompt], progress: Progress) -> Report:
        """Do one step on the global list of prompts, of which this process takes its share."""
        self._observed, rewind = False, rewind_of(self.sampler)
        while True:
            ledger = Ledger.of(progress.step)
            try:
                return self._attempt(prompts, progress, ledger)
            except torch.OutOfMemoryError as error:
                largest = max((policy.counter.largest for policy in self.policies().values()), default=0)
                less = shrink(
                    self.sampler, self.objective, self.chunk, self.devices, ledger.failed or "", largest, error, self.sharding is not None
                )
            self.sampler, self.chunk = less.sampler, less.chunk
            rewind(self.sampler)
            limited(self.objective, less.rows)
            if self.devices.rank == 0:  # the error and its tensors are gone
                say(f"step {progress.step}: {less.said}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(self, prompts: Sequence[Prompt], progress: Progress, ledger: Ledger) -> Report:
        metrics, streams = Metrics(), Streams(self.seed, progress.step)
        self._expect_calls()
        with together(self.devices, self.lockstep):
            trajectories, parts, images = self._roll_out(prompts, progress, streams, ledger, metrics)
        if not self._observed:  # a repeated step counts once
            self.aggregation.observe(parts, trajectories.group, self.devices)
            self._observed = True
        with together(self.devices, self.lockstep):
            rewards = self.aggregation(parts, trajectories.group)
            batch: ScoredBatch = self.aggregation.batch(trajectories, rewards, parts, len(prompts), progress, streams)
            metrics.describe(batch)
        batch = attrs.evolve(batch, deviation=deviation(batch, self.devices))
        factor = scale_learning_rates(self.running.values(), self.lr_factor, progress)
        if self.lr_factor != 1.0:
            metrics.add("lr_factor", torch.tensor(factor), 1)
        self._expect_calls()
        policy = self.objective.policy
        roles = {"policy": policy, **self.policies()}
        try:
            self._update(batch, ledger, roles, metrics)
        except NonFiniteError as error:
            error.evidence = Evidence.of(progress.step, tuple(self.trained()), trajectories, batch)
            raise
        self._hold()
        self.objective.after_step()
        if self.average is not None:
            self.average.update(policy, progress.step)
        self.ledger.add(ledger)
        if self.meter is not None:
            metrics.ratios(self.meter.read(ledger, self._update.trained_among(roles), trajectories.condition.size))
        result = metrics.means(self.devices)
        self.reward = result.get("reward", self.reward)
        if (said := self.objective.observe(result, progress)) and self.devices.rank == 0:
            say(f"step {progress.step}: {said}")
        first = [trajectories.condition.prompts[i] for i in trajectories.group[: self.keep_images].tolist()]
        return Report(progress.step, progress.total, result, ledger.over(self.devices), batch, images, tuple(first))

    def _expect_calls(self) -> None:
        for policy in (self.objective.policy, *self.policies().values()):
            policy.counter.largest = 0

    def _roll_out(
        self, prompts: Sequence[Prompt], progress: Progress, streams: Streams, ledger: Ledger, metrics: Metrics
    ) -> tuple[TrajectoryBatch, Scores, Tensor]:
        """Trajectories of this process, their raw scores, and its first images."""
        policy, behavior = self.objective.policy, self.objective.behavior()
        precision = behavior.precision
        role = next((name for name, known in self.policies().items() if known is behavior), "policy")
        with torch.no_grad():
            with ledger.stage("encode"):
                condition = share_of(prompts, self.devices, policy)
            stages = Stages(policy, behavior, role, self.sampler, self._rewards, progress, streams, ledger, self.chunk, self.keep_images)
            trajectories, parts = stages.complete(*self.rollout(condition, stages))
        if self.check_rows != 0 and (due(progress.step) or not self._checked):
            with ledger.stage("contract", {"policy": behavior}):
                first = check_first_step(behavior, trajectories, progress.step, self.check_rows, precision)
            for name, number in first.metrics().items():
                metrics.add(name, torch.tensor(number), 1)
            self._checked = True
        return trajectories, parts, stages.kept
