"""The one training loop: roll out, score, aggregate within the group, then give each phase of the objective its turn."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from .average import Average
from .contract import TOLERANCE, first_step_deviation
from .errors import NonFiniteError
from .groups import Raw, group_std, log_geometric_mean_distance
from .interfaces import (
    Aggregation,
    Devices,
    Hook,
    Objective,
    OptimizerFactory,
    Phase,
    PromptSource,
    RewardFunction,
    SingleProcess,
    TrajectorySampler,
)
from .interrupt import stop_between_steps
from .ledger import Ledger, peak_memory
from .policy import Policy
from .scoring import named_rewards, score
from .streams import Streams
from .types import Progress, Prompt, ScoredBatch, TrajectoryBatch


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The default optimizer: AdamW, learning rate 1e-4, weight decay 1e-4."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4)


@attrs.frozen(eq=False)
class Report:
    """What a step did.

    Args:
        step: the number of this step, from 0
        total: steps of the run
        metrics: by name, means over samples and ranks
        ledger: cost of this step
        batch: the scored trajectories of this process
        images: [n, 3, H, W] the first few pictures, on the CPU
        prompts: their n prompts
    """

    step: int
    total: int
    metrics: Mapping[str, float]
    ledger: Ledger
    batch: ScoredBatch
    images: Tensor
    prompts: tuple[Prompt, ...]


@attrs.define(eq=False)
class AlignmentLoop:
    """Aligns a policy. The order of a step: encode, sample, decode and score, aggregate, contract, phases.

    Losses are means over the global number of prompt groups. All gradients of a phase are computed and checked before any of its
    roles steps; if a later phase fails, everything is as it was when the step began.

    Args:
        objective: what moves the weights
        sampler: how trajectories are drawn
        rewards: a reward, or several by name; raw scores are always logged by name
        prompts: where prompts come from
        aggregation: raw scores -> the reward that the objective sees
        prompts_per_step: prompt groups of a step, over all processes
        optimizers: role -> factory; a role that is not named gets the entry "default", or AdamW at 1e-4
        max_grad_norm: gradients are clipped to it per role; None leaves them
        average: moving average of the policy for evaluation
        hooks: progress, metrics, checkpoints, evaluation
        devices: the processes of the run
        seed: of every random draw
        chunk: images that are decoded and scored at once
        check_rows: network rows that the first-step contract may spend per step; 0 switches it off
        keep_images: pictures that a report carries
        folder: where hooks write the run's files; None where there is none
    """

    objective: Objective
    sampler: TrajectorySampler
    rewards: RewardFunction | Mapping[str, RewardFunction]
    prompts: PromptSource
    aggregation: Aggregation = attrs.field(factory=Raw)
    prompts_per_step: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    optimizers: Mapping[str, OptimizerFactory] = attrs.field(factory=dict)
    max_grad_norm: float | None = attrs.field(default=1.0, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    average: Average | None = None
    hooks: Sequence[Hook] = ()
    devices: Devices = attrs.field(factory=SingleProcess)
    seed: int = 0
    chunk: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    check_rows: int = attrs.field(default=2, validator=attrs.validators.ge(0))
    keep_images: int = 16
    folder: Path | None = None
    ledger: Ledger = attrs.field(factory=Ledger, init=False)
    running: dict[str, torch.optim.Optimizer] = attrs.field(factory=dict, init=False)
    reward: float | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._rewards = named_rewards(self.rewards)
        self._phases = self.objective.phases()
        roles = [role for phase in self._phases for role in phase.trains]
        if strangers := set(self.optimizers) - set(roles) - {"default"}:
            raise ValueError(f"optimizers has an entry {sorted(strangers)[0]!r}; the roles are {', '.join(roles)}, or 'default' for all")
        for role, policy in self.trained().items():
            parameters = list(policy.trainable_parameters().values())
            if not parameters:
                raise ValueError(
                    f"role {role!r} has nothing to train: no parameter requires grad. Give the policy LoRA, or fork it trainable."
                )
            _refuse_dropout(role, policy)
            self.running[role] = self.optimizers.get(role, self.optimizers.get("default", adamw))(parameters)
        if self.average is not None:
            self.average.start(self.objective.policy)

    # attrs.define makes slots, so these need a field of their own
    _rewards: dict[str, RewardFunction] = attrs.field(init=False, repr=False)
    _phases: tuple[Phase, ...] = attrs.field(init=False, repr=False)

    def trained(self) -> dict[str, Policy]:
        """Role -> weights, over all phases."""
        return {role: policy for phase in self._phases for role, policy in phase.trains.items()}

    def named_rewards(self) -> dict[str, RewardFunction]:
        """The rewards by name."""
        return dict(self._rewards)

    def evaluation_policy(self) -> Policy:
        """The average where there is one, else the policy itself."""
        averaged = None if self.average is None else self.average.policy
        return self.objective.policy if averaged is None else averaged

    def run(self, total: int, start: int = 0) -> None:
        """Do the steps `start` .. `total` - 1.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the step under way was finished, the hooks have stopped.
        """
        if not 0 <= start <= total:
            raise ValueError(f"start must lie between 0 and total = {total}; got {start}")
        step = start
        with stop_between_steps() as request:
            try:
                for hook in self.hooks:
                    hook.start(self, start, total)
                for step in range(start, total):
                    report = self.step(self.prompts.draw(step, self.prompts_per_step), Progress(step, total, self.reward))
                    step += 1  # noqa: PLW2901  steps done
                    for hook in self.hooks:
                        hook.step(self, report)
                    if request.received is not None:
                        raise KeyboardInterrupt(request.received.name)
            except BaseException as error:
                self._stop(step, error)
                raise
            self._stop(step, None)

    def _stop(self, step: int, error: BaseException | None) -> None:
        for hook in self.hooks:
            hook.stop(self, step, error)

    def step(self, prompts: Sequence[Prompt], progress: Progress) -> Report:
        """One step on the global list of prompts, of which this process takes its share."""
        ledger, policy = Ledger(), self.objective.policy
        roles = {"policy": policy, **self.objective.policies(), **self.trained()}
        share = range(len(prompts))[self.devices.rank :: self.devices.size]
        streams = Streams(self.seed, progress.step)
        behavior = self.objective.behavior()
        with torch.no_grad():
            with ledger.stage("encode"):
                condition = policy.encode([_as_prompt(prompts[i]) for i in share])
                condition = attrs.evolve(condition, ids=torch.tensor(list(share)))
            with ledger.stage("rollout", {"policy": behavior}):
                trajectories = self.sampler.sample(behavior, condition, progress, streams)
            _require_finite(trajectories)
            parts, images = self._score(policy, trajectories, ledger)
        batch = ScoredBatch(trajectories, self.aggregation(parts, trajectories.group), parts, len(prompts), progress, streams)
        metrics = _Metrics()
        if self.check_rows:
            with ledger.stage("contract", {"policy": behavior}):
                dtype = next((p.dtype for p in behavior.parameters()), torch.float32)
                deviation = first_step_deviation(behavior, trajectories, self.check_rows, TOLERANCE[dtype])
            metrics.add("contract/deviation", torch.tensor(deviation), 1)
        self._describe(batch, metrics)
        self._update(batch, ledger, roles, metrics)
        self.objective.after_step()
        if self.average is not None:
            self.average.update(policy, progress.step)
        self.ledger.add(ledger)
        result = metrics.means(self.devices)
        self.reward = result["reward"]
        first = [trajectories.condition.prompts[i] for i in trajectories.group[: self.keep_images].tolist()]
        return Report(progress.step, progress.total, result, ledger, batch, images, tuple(first))

    def _score(self, policy: Policy, trajectories: TrajectoryBatch, ledger: Ledger) -> tuple[dict[str, Tensor], Tensor]:
        prompts = [trajectories.condition.prompts[i] for i in trajectories.group.tolist()]
        chunks: list[dict[str, Tensor]] = []
        kept: list[Tensor] = []
        for start in range(0, len(prompts), self.chunk):
            with ledger.stage("decode"):
                images = policy.decode(trajectories.samples[start : start + self.chunk])
            with ledger.stage("reward"):
                chunks.append(score(self._rewards, images, prompts[start : start + self.chunk]))
            kept.append(images[: max(0, self.keep_images - start)].cpu())
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in self._rewards}, torch.cat(kept)

    def _describe(self, batch: ScoredBatch, metrics: "_Metrics") -> None:
        group = batch.trajectories.group
        raw = Raw(self.aggregation.weights)(batch.parts, group)
        metrics.add("reward", raw.sum(), len(raw))
        for name, values in batch.parts.items():
            metrics.add(f"reward/{name}", values.sum(), len(values))
        metrics.add("reward/group_std", group_std(raw, group).sum(), len(raw))
        spread = log_geometric_mean_distance(batch.trajectories.samples, group)
        metrics.add("diversity/l_gmd", spread.sum(), len(spread))

    def _update(self, batch: ScoredBatch, ledger: Ledger, roles: Mapping[str, Policy], metrics: "_Metrics") -> None:
        undo = self._snapshot() if sum(phase.repeats * len(phase.trains) for phase in self._phases) > 1 else None
        try:
            for phase in self._phases:
                for update in range(phase.repeats):
                    with ledger.stage("update", roles):
                        self._step_phase(phase, batch, update, metrics)
        except BaseException:
            if undo is not None:
                undo()
            raise

    def _snapshot(self) -> Callable[[], None]:
        """Remember trainable tensors and optimizers as they are; what it returns undoes earlier phases when a later one fails."""
        values = [(p, p.detach().clone()) for policy in self.trained().values() for p in policy.trainable_parameters().values()]
        states = {role: copy.deepcopy(optimizer.state_dict()) for role, optimizer in self.running.items()}

        def undo() -> None:
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)
            for role, state in states.items():
                self.running[role].load_state_dict(state)

        return undo

    def _step_phase(self, phase: Phase, batch: ScoredBatch, update: int, metrics: "_Metrics") -> None:
        for role in phase.trains:
            self.running[role].zero_grad(set_to_none=True)
        for loss in phase.losses(batch, update):
            if not torch.is_grad_enabled() or torch.is_autocast_enabled(loss.value.device.type):
                raise RuntimeError(
                    f"the losses of {', '.join(phase.trains)} yielded inside no_grad or autocast, which leaks into the loop's backward; "
                    "leave the block before each yield."
                )
            if not bool(loss.value.isfinite()):
                raise NonFiniteError(
                    f"role {', '.join(phase.trains)}, step {batch.progress.step}: loss is {loss.value.item()}. Nothing was updated."
                )
            if loss.value.requires_grad:
                loss.value.backward()
            for name, (total, count) in loss.metrics.items():
                metrics.add(name, total, count)
        norms = {role: self._gradient_norm(role, policy, batch.progress.step) for role, policy in phase.trains.items()}
        for role, policy in phase.trains.items():
            metrics.add(f"grad_norm/{role}", norms[role], 1)
            if self.max_grad_norm is not None:
                parameters = list(policy.trainable_parameters().values())
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norms[role])
            self.running[role].step()
            self.objective.after_update(role)

    def _gradient_norm(self, role: str, policy: Policy, step: int) -> Tensor:
        parameters = policy.trainable_parameters()
        self.devices.sum_gradients(list(parameters.values()))
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        if not bool(norm.isfinite()):
            name = max(gradients, key=lambda name: (not gradients[name].isfinite().all(), float(gradients[name].abs().max())))
            raise NonFiniteError(f"role {role!r}, step {step}: gradient of {name!r} is not finite. Nothing was updated.")
        return norm


@attrs.define
class _Metrics:
    """Sums and counts by name."""

    sums: dict[str, tuple[Tensor, Tensor]] = attrs.field(factory=dict)

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        pair = (total.detach().double().cpu(), torch.as_tensor(count).double().cpu())
        old = self.sums.get(name)
        self.sums[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def means(self, devices: Devices) -> dict[str, float]:
        table = devices.sum(torch.tensor([[total.item(), count.item()] for total, count in self.sums.values()], dtype=torch.float64))
        result = {name: (row[0] / max(row[1], 1e-300)) for name, row in zip(self.sums, table.tolist(), strict=True)}
        return {**result, "memory/peak_bytes": float(peak_memory())}


def _as_prompt(prompt: str) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


def _require_finite(trajectories: TrajectoryBatch) -> None:
    finite = trajectories.latents.flatten(1).isfinite().all(dim=1) & trajectories.log_prob.isfinite()
    if not bool(finite.all()):
        node = int((~finite).nonzero()[0])
        level = int(trajectories.level[node])
        prompt = str(trajectories.condition.prompts[int(trajectories.prompt[node])])
        raise NonFiniteError(
            f"rollout: latents or log-prob are not finite at level {level} (sigma {trajectories.sigmas[level].item():.4g}), "
            f"prompt {prompt!r}. Nothing was updated."
        )


def _refuse_dropout(role: str, policy: Policy) -> None:
    for name, module in policy.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise ValueError(f"role {role!r}: {name!r} has dropout {module.p:g}; replay could not be exact. Set it to 0.")
