"""How good is a surrogate, and how noisy is its pull on the generator? Three numbers for settings of TDM-R1, the student at rest.

Two surrogates learn from `--steps` batches each, disjoint ones, as the run file draws them. Then, on fresh samples:

    pairs       share of a group's pairs with different rewards that the surrogate orders rightly (1/2 is chance)
    agreement   cosine of where the two surrogates point, f_phi - f_base at equal draws of tau and noise, by stage; mean over samples
    signal      |E g|^2 / E |g|^2 of the reward term's gradient g of one step for the generator's weights, over `--batches` further steps of
                the run: the squared cosine between one step's gradient and the true one, with its jackknife error

The first two speak of what the surrogate has learned, the third of how a step uses it: it is where independent draws of stages, tau and
noise help, which leave the mean of the direction as it is. No weight of the generator moves.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from benchmarks.intervals import shown
from benchmarks.record import Record
from benchmarks.study.gradient_noise import Recorder, signal
from benchmarks.study.probe import around, learned, run_of, scored, surrogate_direction
from benchmarks.subjects.surrogate_order import implicit_rewards, pairs_ordered
from diffalign import AlignmentLoop, Prompt
from diffalign.core import Objective, Phase, Policy, Progress, Streams
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step import WeightedMix
from diffalign.objectives.few_step.stages import Rows
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler

OTHER = 1_000_003
"""What is added to a seed for the second surrogate's samples."""


@attrs.define(eq=False)
class Pull(Objective):
    """The generator's phase of TDM-R1 alone.

    Args:
        inside: with the plan `InOrder`, and a mix of the reward alone
    """

    inside: SurrogateReward
    policy: Policy = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.policy = self.inside.policy

    def phases(self) -> tuple[Phase, ...]:
        return tuple(phase for phase in self.inside.phases() if set(phase.trains) == {"generator"})

    def policies(self) -> Mapping[str, Policy]:
        return self.inside.policies()


def pulls(loop: AlignmentLoop, objective: SurrogateReward, steps: int, batches: int) -> Tensor:
    """Inner products [n, n] of the reward term's gradients in n steps after the first `steps`."""
    objective.mix = WeightedMix(reward=1.0, guidance=0.0, kl=0.0)
    alone = around(loop, Pull(objective), max_grad_norm=None)  # clipped gradients would hide their lengths
    recorder = alone.running["generator"] = Recorder(objective.policy.trainable_parameters().values())
    for step in range(steps, steps + batches):
        alone.step(alone.prompts.draw(step, alone.prompts_per_step), Progress(step, steps + batches))
    rows = torch.stack([torch.cat([gradient.flatten().double() for gradient in seen]) for seen in recorder.seen])
    return rows @ rows.T


@torch.no_grad()
def learned_by(both: Sequence[SurrogateReward], loop: AlignmentLoop, asked: Sequence[Prompt], samples: int, seed: int) -> dict[str, Any]:
    """Pairs that the first of two surrogates orders rightly, and the cosine of their directions at each stage, on fresh samples."""
    student = both[0].policy
    if not isinstance(student, TDMPolicy):
        raise ValueError("study surrogate needs a run around a TDMPolicy")
    condition = student.encode(asked)
    batch = DeterministicSampler(student.steps, samples).sample(student, condition, Progress(0, 1), Streams(5_000_011 + seed))
    (reward,) = loop.named_rewards().values()
    implicit = implicit_rewards(both[0], batch, draws=4, seed=seed)
    agreement = []
    for stage in range(student.steps):
        rows = Rows.of(batch, (stage,))
        one, other = (surrogate_direction(objective, Streams(5_000_011 + seed, 1))(rows, condition).flatten(1) for objective in both)
        agreement.append(float(torch.cosine_similarity(one, other, dim=1).mean()))
    return {"pairs": pairs_ordered(implicit, scored(student, reward, batch.samples, batch), batch.group), "agreement": agreement}


@attrs.frozen
class Options:
    """What is measured.

    Args:
        run: a run file of TDM-R1
        set: what to change in it, as objective.reward_floor=0.5
        prompts: of the fresh samples
        steps: batches that each surrogate learns from
        groups: of fresh samples
        samples: of each
        batches: steps whose gradients are compared
        seeds: measurements, each with two surrogates of its own
        first: the first seed; 100 begins a search
        json: rows are added to it; those that it holds are not made again
    """

    run: str
    set: tuple[str, ...] = ()
    prompts: tuple[str, ...] = attrs.field(default=("a digit",), validator=attrs.validators.min_len(1))
    steps: int = 20
    groups: int = 32
    samples: int = 16
    batches: int = attrs.field(default=24, validator=attrs.validators.ge(3))
    seeds: int = 1
    first: int = 0
    json: Path | None = None

    def measured(self, seed: int) -> dict[str, Any]:
        """The three numbers of one seed."""
        changes = [f"--{change}" for change in self.set]
        loop, disjoint = run_of(self.run, changes, seed), run_of(self.run, changes, seed + OTHER)
        both = [learned(loop, self.steps, False), learned(disjoint, self.steps, False)]
        asked = [Prompt(self.prompts[index % len(self.prompts)]) for index in range(self.groups)]
        found = learned_by(both, loop, asked, self.samples, seed)
        share, error = signal(pulls(loop, both[0], self.steps, self.batches))
        return {**found, "signal": share, "signal error": error}


def line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Means of some seeds with 95 % intervals."""
    stages = "  ".join(shown(list(values), 2) for values in zip(*(row["agreement"] for row in rows), strict=True))
    pairs, share = ([row[key] for row in rows] for key in ("pairs", "signal"))
    return f"{name:70s} n={len(rows)}  pairs {shown(pairs)}  agreement {stages}  signal {shown(share)}"


def main(options: Options) -> None:
    record = Record(options.json)
    about = attrs.asdict(options, filter=lambda field, _: field.name not in ("seeds", "first", "json"))
    about = {**about, "set": sorted(options.set), "prompts": list(options.prompts)}
    rows = []
    for seed in range(options.first, options.first + options.seeds):
        rows.append(record.run("runs", {**about, "seed": seed}, functools.partial(options.measured, seed)))
        print(line(f"seed {seed}", rows[-1:]), flush=True)
    print(line(" ".join([f"{options.steps} batches", *about["set"]]), rows))
