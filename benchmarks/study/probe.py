"""Does the learned reward point uphill? A student at rest, pushed both ways along the reward's direction at each of its stages.

The run is that of a run file of TDM-R1: `digits_tdm_r1` (whose student `diffalign train digits_tdm` makes) or `shapeworld_tdm_r1`. The
student rests. Its surrogate is trained on `--steps` batches as the run draws them. Then fresh samples are moved at one stage, as the
generator would be asked to move them,

    x+- = x_{j+1} +- (1 - s_{j+1} / s_j) size D / rms(D),        D = f_phi(x_tau) - f_base(x_tau) of each sample

finished by the student, and scored: the ascent is half the difference of the exact reward, and its standard error that over groups, which
may share noise. That is of one surrogate. With several seeds, each with a surrogate of its own, the last line has the error over them.

Controls: `--judge` (digits) takes the gradient of the judge's log-probability of the rewarded digits instead of what the surrogate says,
which ascends by construction; `--reward shuffled` trains the surrogate on rewards that are shuffled within their groups: any one such
surrogate points somewhere, and over seeds they must not ascend. Seconds to minutes; no generator is trained.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.record import write
from benchmarks.subjects.surrogate_order import reference_of
from diffalign import AlignmentLoop, Prompt, config
from diffalign.core import Condition, Loss, Objective, Phase, Policy, Progress, ScoredBatch, Streams, TrajectoryBatch
from diffalign.digits.judge import FILE
from diffalign.digits.networks import JudgeNetwork
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step.matching import Predictor, Queries
from diffalign.objectives.few_step.roles import unguided
from diffalign.objectives.few_step.stages import Rows
from diffalign.objectives.noising import diffuse
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler

LEARNERS = ("reference", "surrogate")
"""Roles that learn while the student rests."""

Direction = Callable[[Rows, Condition], Tensor]
"""Stages of samples and the prompts of all rows -> where each clean prediction shall go [B, *]."""


@attrs.define(eq=False)
class AtRest(Objective):
    """TDM-R1 without its generator and its fake: the surrogate alone learns.

    Args:
        inside: with the plan `InOrder`, which has a phase for each role
        shuffled: whether the rewards of a group are given to its samples in another order
    """

    inside: SurrogateReward
    shuffled: bool = False
    policy: Policy = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.policy = self.inside.policy

    def phases(self) -> tuple[Phase, ...]:
        learning = [phase for phase in self.inside.phases() if set(phase.trains) <= set(LEARNERS)]
        if not learning:
            raise ValueError("the probe needs the surrogate in a phase of its own; give the objective plan=InOrder()")
        return tuple(attrs.evolve(phase, losses=self._given(phase)) for phase in learning)

    def _given(self, phase: Phase) -> Callable[[ScoredBatch, int], Iterator[Loss]]:
        return lambda batch, update: phase.losses(shuffled(batch) if self.shuffled else batch, update)

    def policies(self) -> Mapping[str, Policy]:
        return self.inside.policies()

    def after_step(self) -> None:
        self.inside.after_step()


def shuffled(batch: ScoredBatch) -> ScoredBatch:
    """The rewards of every group in another order."""
    rewards, group = batch.rewards.clone(), batch.trajectories.group
    for index, prompt in enumerate(batch.trajectories.condition.ids.tolist()):
        mine = (group == index).nonzero().squeeze(1)
        order = torch.from_numpy(batch.streams.generator("probe/shuffled", prompt).permutation(len(mine)))
        rewards[mine] = batch.rewards[mine[order]]
    return attrs.evolve(batch, rewards=rewards)


def run_of(run: str, changes: Sequence[str], seed: int) -> AlignmentLoop:
    """The loop of a run file, without what watches it."""
    fixed = [f"--seed={seed}", "--objective.plan={class_path: InOrder, init_args: {}}", "--average=null", "--evaluation=null", "--hooks=[]"]
    return config.parse(run, [*changes, *fixed]).build()


def learned(loop: AlignmentLoop, steps: int, shuffle: bool) -> SurrogateReward:
    """The objective of a loop after its surrogate has seen some batches of the resting student."""
    objective = loop.objective
    if not isinstance(objective, SurrogateReward) or not isinstance(objective.policy, TDMPolicy):
        raise ValueError("the probe needs a run of SurrogateReward around a TDMPolicy")
    alone = around(loop, AtRest(objective, shuffle), loop.max_grad_norm)
    alone.run(steps)
    return objective


def around(loop: AlignmentLoop, objective: Objective, max_grad_norm: float | None) -> AlignmentLoop:
    """A loop of the same parts around another objective, with the optimizers of the roles that it trains."""
    roles = {role for phase in objective.phases() for role in phase.trains}
    return AlignmentLoop(
        objective=objective,
        sampler=loop.sampler,
        rewards=loop.rewards,
        prompts=loop.prompts,
        aggregation=loop.aggregation,
        prompts_per_step=loop.prompts_per_step,
        optimizers={role: factory for role, factory in loop.optimizers.items() if role in roles or role == "default"},
        max_grad_norm=max_grad_norm,
        seed=loop.seed,
        check_rows=0,
    )


def surrogate_direction(objective: SurrogateReward, streams: Streams) -> Direction:
    """Where the generator's reward term would move a clean prediction, from one draw of tau and noise."""
    named = objective.policies()
    base = reference_of(objective)
    if objective.baseline != objective.reference:
        base = named.get("baseline", unguided(named["teacher"]))
    surrogate, baseline = Predictor(named["surrogate"], objective.reward_guidance, objective.negative), Predictor(base)
    queries = Queries(
        objective.reward_interval,
        objective.times,
        objective.reward_floor,
        objective.shared,
        noise_by_group=objective.reward_noise == "group",
        ceiling=objective.reward_ceiling,
    )

    def direction(rows: Rows, condition: Condition) -> Tensor:
        tau, noise = queries(rows, streams, "probe")
        noised, asked = diffuse(rows.end, rows.sigma_end, tau, noise), condition.select(rows.prompt)
        return surrogate(noised, tau, asked)[1] - baseline(noised, tau, asked)[0]

    return direction


def judge_direction(student: TDMPolicy, classes: Sequence[int]) -> Direction:
    """The gradient of the judge's log-probability of some digits, through the stages that are left."""
    judge = JudgeNetwork()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()})
    judge.requires_grad_(False)

    def direction(rows: Rows, condition: Condition) -> Tensor:
        with torch.enable_grad():
            end = rows.end.clone().requires_grad_()
            final = finished(student, end, int(rows.stage[0]) + 1, condition.select(rows.prompt))
            value = judge(final.clamp(-1, 1)).log_softmax(dim=1)[:, list(classes)].logsumexp(dim=1).sum()
            (found,) = torch.autograd.grad(value, end)
        return found

    return direction


def finished(student: TDMPolicy, state: Tensor, level: int, condition: Condition) -> Tensor:
    """The samples that the student makes of states at the beginning of a stage."""
    for stage in range(level, student.steps):
        state = student.stage(state, stage, condition)[0]
    return state


@attrs.frozen
class Ascent:
    """What a push gives.

    Args:
        stage: where
        ascent: half the difference in reward
        error: its standard error, over groups
        reward: without a push
        size: rms of the direction before it was scaled
    """

    stage: int
    ascent: float
    error: float
    reward: float
    size: float


@torch.no_grad()
def ascents(
    student: TDMPolicy,
    reward: Callable[[Tensor, Sequence[Prompt]], Tensor],
    prompts: Sequence[Prompt],
    direction: Direction,
    samples: int,
    push: float,
    seed: int,
) -> list[Ascent]:
    """The ascent at each stage.

    Args:
        student: at rest
        reward: exact
        prompts: one a group; a prompt may come several times
        direction: of the push
        samples: of each group
        push: its size, in units of the clean prediction's pixels
        seed: of samples and noise
    """
    condition = student.encode(prompts)
    batch = DeterministicSampler(student.steps, samples).sample(student, condition, Progress(0, 1), Streams(5_000_011 + seed))
    plain = scored(student, reward, batch.samples, batch)
    found = []
    for stage in range(student.steps):
        rows = Rows.of(batch, (stage,))
        towards = direction(rows, condition)
        size = towards.square().mean().sqrt()
        step = (1 - rows.sigma_end / rows.sigma).reshape(-1, *(1,) * (towards.ndim - 1)) * towards * (push / size)
        asked = condition.select(rows.prompt)
        up, down = (scored(student, reward, finished(student, rows.end + sign * step, stage + 1, asked), batch) for sign in (1.0, -1.0))
        by_group = torch.stack([((up - down) / 2)[batch.group == group].mean() for group in range(len(prompts))])
        error = by_group.std() / len(prompts) ** 0.5
        found.append(Ascent(stage, float(by_group.mean()), float(error), float(plain.mean()), float(size)))
    return found


def scored(student: TDMPolicy, reward: Callable[[Tensor, Sequence[Prompt]], Tensor], samples: Tensor, batch: TrajectoryBatch) -> Tensor:
    """The reward of each sample [K], float64."""
    prompts = [batch.condition.prompts[index] for index in batch.group.tolist()]
    return reward(student.decode(samples), prompts).double().cpu()


def probe(
    run: str,
    changes: Sequence[str],
    prompts: Sequence[Prompt],
    steps: int,
    groups: int,
    samples: int,
    push: float,
    seed: int,
    shuffle: bool = False,
    judge: Sequence[int] | None = None,
) -> list[Ascent]:
    """The ascent at each stage of a run's student along what its surrogate has learned.

    Args:
        run, changes: run file and options, as `diffalign train` takes them
        prompts: of the fresh samples
        steps: batches that the surrogate learns from
        groups, samples: of the fresh samples
        push: see `ascents`
        seed: of everything
        shuffle: the negative control
        judge: the positive control, digits that are rewarded; no surrogate is trained then
    """
    loop = run_of(run, changes, seed)
    student = loop.objective.policy
    if not isinstance(student, TDMPolicy):
        raise ValueError("the probe needs a run around a TDMPolicy")
    if judge is None:
        direction = surrogate_direction(learned(loop, steps, shuffle), Streams(5_000_011 + seed, 1))
    else:
        direction = judge_direction(student, judge)
    (reward,) = loop.named_rewards().values()
    asked = [prompts[index % len(prompts)] for index in range(groups)]
    return ascents(student, reward, asked, direction, samples, push, seed)


def line(name: str, seed: int, found: Sequence[Ascent]) -> str:
    """One line of the table."""
    cells = "  ".join(f"{entry.ascent:+.4f} +- {entry.error:.4f}" for entry in found)
    return f"{name:60s} seed {seed:3d}  reward {found[0].reward:.3f}  stages: {cells}"


def summary(name: str, runs: Sequence[Sequence[Ascent]]) -> str:
    """Means over seeds, each with a surrogate of its own, and their standard errors: what one surrogate gives by chance is in them."""
    table = torch.tensor([[entry.ascent for entry in found] for found in runs], dtype=torch.float64)
    means, errors = table.mean(dim=0).tolist(), (table.std(dim=0) / len(runs) ** 0.5).tolist()
    cells = "  ".join(f"{mean:+.4f} +- {error:.4f}" for mean, error in zip(means, errors, strict=True))
    return f"{name:60s} {len(runs):3d} seeds                 stages: {cells}"


@attrs.frozen
class Options:
    """What is probed.

    Args:
        run: a run file of TDM-R1
        set: what to change in it, as objective.reward_floor=0.5
        reward: what the surrogate learns from
        judge: digits that are rewarded: the gradient of the judge instead of the surrogate (digits)
        prompts: of the fresh samples
        steps: batches that the surrogate learns from
        groups: of fresh samples
        samples: of each
        push: rms of the push
        seeds: probes, each with a surrogate of its own
        first: the first seed; 100 begins a search
        json: rows are added to it; those that it holds are not made again
    """

    run: str
    set: tuple[str, ...] = ()
    reward: Literal["exact", "shuffled"] = "exact"
    judge: tuple[int, ...] = ()
    prompts: tuple[str, ...] = attrs.field(default=("a digit",), validator=attrs.validators.min_len(1))
    steps: int = 40
    groups: int = 64
    samples: int = 16
    push: float = 0.15
    seeds: int = 1
    first: int = 0
    json: Path | None = None

    def about(self, seed: int) -> dict[str, Any]:
        """What tells rows apart."""
        return {
            "run": self.run,
            "set": sorted(self.set),
            "reward": self.reward,
            "judge": list(self.judge) or None,
            "seed": seed,
            "prompts": list(self.prompts),
            "steps": self.steps,
            "groups": self.groups,
            "samples": self.samples,
            "push": self.push,
        }

    def probed(self, seed: int) -> list[Ascent]:
        """The ascents of one seed."""
        return probe(
            self.run,
            [f"--{change}" for change in self.set],
            [Prompt(text) for text in self.prompts],
            self.steps,
            self.groups,
            self.samples,
            self.push,
            seed,
            self.reward == "shuffled",
            self.judge or None,
        )


def main(options: Options) -> None:
    file = options.json
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file is not None and file.exists() else []
    runs: list[list[Ascent]] = []
    name = "judge" if options.judge else " ".join([options.reward, f"{options.steps} steps", *sorted(options.set)])
    for seed in range(options.first, options.first + options.seeds):
        about = options.about(seed)
        known = next((row for row in rows if {key: row[key] for key in about} == about), None)
        if known is None:
            known = {**about, "stages": [attrs.asdict(entry) for entry in options.probed(seed)]}
            rows.append(known)
            write(file, rows)
        runs.append([Ascent(**entry) for entry in known["stages"]])
        print(line(name, seed, runs[-1]), flush=True)
    if len(runs) > 1:
        print(summary(name, runs), flush=True)
