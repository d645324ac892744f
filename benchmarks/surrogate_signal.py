"""What a surrogate learns from rewards, against the teacher and against the score of the student that the samples come from.

python benchmarks/surrogate_signal.py [--anchor teacher student] [--steps 90] [--samples 24] [--strengths 0 1 3] [--json FILE]

Samples of the shipped ShapeWorld student for all count prompts are stored once. A surrogate v_phi, a fork of the anchor, is then trained on
them by the group loss that is linear in the advantage A of exact pictures, noised to levels 0.6-0.95:

    A / 2 ||v_phi - v*||^2 + r ||v_phi - v_anchor||^2,    optimum v_phi - v_anchor = E[A (v* - v_anchor) | x_tau] / (2 r + E[A | x_tau])

The anchor is the teacher, or a fork of it that has first regressed on the same samples without rewards. Printed, on held-out prompts:

    signal      E[A <v_phi - v_anchor, v* - v_anchor>] / rms(v_phi - v_anchor), per dimension, at levels 0.7, 0.8, 0.9
    exact       share of exact pictures of v_anchor + k (v_phi - v_anchor), 20 steps: whether what was learned is worth following

Against the teacher the signal contains E[A | x_tau] (v_student - v_teacher), which says that good samples look like the student's, and not
what makes them good. Twelve minutes on one free core.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import torch
from tdm_r1_study import start
from torch import Tensor

from diffalign import Progress, Prompt, Streams
from diffalign.core import Condition, Policy, PolicyAround
from diffalign.evaluation import evaluate
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler
from diffalign.shapeworld import ExactMatch

LEVELS = (0.7, 0.8, 0.9)
LOW, HIGH = 0.6, 0.95
REGULARIZATION = 0.75
GROUPS = 4
"""Prompts of one step."""


@attrs.frozen(eq=False)
class Group:
    """Samples [K, *] of a prompt and their advantages [K]."""

    prompt: Prompt
    samples: Tensor
    advantage: Tensor


@torch.no_grad()
def groups_of(student: Policy, prompts: Sequence[Prompt], count: int) -> list[Group]:
    """A group for each prompt; those without any difference in reward are left out."""
    found, reward = [], ExactMatch()
    for place, prompt in enumerate(prompts):
        sampler = DeterministicSampler(steps=4, samples=count)
        samples = sampler.sample(student, student.encode([prompt]), Progress(0, 1), Streams(7, place)).samples
        exact = reward(student.decode(samples), [prompt] * count).float()
        if exact.std() > 0:
            found.append(Group(prompt, samples, (exact - exact.mean()) / 0.5))
    return found


def noised(
    groups: Sequence[Group], levels: Sequence[float], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, list[Prompt], Tensor]:
    """States, levels, velocities, prompts and advantages; one noise for a group."""
    states, taus, targets = [], [], []
    for group, level in zip(groups, levels, strict=True):
        noise = torch.randn(group.samples.shape[1:], generator=generator).expand_as(group.samples)
        states.append((1 - level) * group.samples + level * noise)
        targets.append(noise - group.samples)
        taus.append(torch.full((len(noise),), level))
    prompts = [group.prompt for group in groups for _ in group.samples]
    return torch.cat(states), torch.cat(taus), torch.cat(targets), prompts, torch.cat([group.advantage for group in groups])


def batches(groups: Sequence[Group], steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Prompt], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = [groups[index] for index in torch.randint(len(groups), (GROUPS,), generator=generator).tolist()]
        yield noised(some, (LOW + (HIGH - LOW) * torch.rand(GROUPS, generator=generator)).tolist(), generator)


def squares(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(dim=1)


def trained(policy: Policy, anchor: Policy | None, groups: Sequence[Group], steps: int, seed: int) -> None:
    """Regress `policy` on the samples, or, beside an anchor, by their advantages."""
    parameters = list(policy.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0)
    for states, taus, targets, prompts, advantage in batches(groups, steps, seed):
        condition = policy.encode(prompts)
        velocity = policy.velocity(states, taus, condition)
        loss = squares(velocity - targets)
        if anchor is not None:
            with torch.no_grad():
                still = anchor.velocity(states, taus, condition)
            loss = advantage * loss / 2 + REGULARIZATION * squares(velocity - still)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@torch.no_grad()
def signal(policy: Policy, anchor: Policy, groups: Sequence[Group]) -> list[float]:
    """See above, at each of `LEVELS`."""
    row = []
    for level in LEVELS:
        generator = torch.Generator().manual_seed(5)
        along, size = torch.zeros(0), torch.zeros(0)
        for group in groups:
            states, taus, targets, prompts, advantage = noised([group], [level], generator)
            condition = policy.encode(prompts)
            still = anchor.velocity(states, taus, condition)
            gain = policy.velocity(states, taus, condition) - still
            along = torch.cat([along, advantage * (gain * (targets - still)).flatten(1).mean(dim=1)])
            size = torch.cat([size, squares(gain)])
        row.append(float(along.mean() / size.mean().sqrt()))
    return row


class Followed(PolicyAround):
    """v_anchor + strength (v_phi - v_anchor), at noise levels at which the surrogate was trained."""

    def __init__(self, anchor: Policy, surrogate: Policy, strength: float) -> None:
        super().__init__(anchor)
        self.surrogate = surrogate
        self.strength = strength

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        velocity = self.policy.velocity(latents, sigma, condition)
        if float(sigma.max()) < LOW or not self.strength:
            return velocity
        return velocity + self.strength * (self.surrogate.velocity(latents, sigma, condition) - velocity)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> "Followed":
        return Followed(self.policy.fork(trainable=trainable, pristine=pristine), self.surrogate.fork(), self.strength)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor", nargs="+", choices=("teacher", "student"), default=("teacher", "student"))
    parser.add_argument("--steps", type=int, default=90, help="of the surrogate, and of the student's score before it")
    parser.add_argument("--samples", type=int, default=24, help="of each prompt")
    parser.add_argument("--prompts", type=int, help="the first of either list; all by default")
    parser.add_argument("--strengths", type=float, nargs="+", default=(0.0, 1.0, 3.0))
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student = start()
    prompts, held_out = (read_prompts(f"shapeworld/{name}")[: arguments.prompts] for name in ("count", "count-held-out"))
    training, asked = (groups_of(student, some, arguments.samples) for some in (prompts, held_out))
    table: dict[str, dict[str, object]] = {}
    for name in arguments.anchor:
        anchor = student.policy.fork(pristine=True)
        if name == "student":
            score = anchor.fork(trainable=True)
            trained(score, None, training, arguments.steps, seed=1)
            anchor = score.fork()
        surrogate = anchor.fork(trainable=True)
        trained(surrogate, anchor, training, arguments.steps, seed=2)
        found = signal(surrogate, anchor, asked)
        print(f"{name:8s} signal " + "  ".join(f"{level:g}: {value:.4f}" for level, value in zip(LEVELS, found, strict=True)), flush=True)
        shares = {}
        for strength in arguments.strengths:
            policy = Followed(anchor, surrogate, strength)
            result = evaluate(policy, held_out, {"exact": ExactMatch()}, samples=8, steps=20, seed=0, pictures=0)
            shares[f"{strength:g}"] = float(result.rewards["exact"].mean())
            print(f"{name:8s} k = {strength:<4g} exact {shares[f'{strength:g}']:.3f}", flush=True)
        table[name] = {"signal": dict(zip(map(str, LEVELS), found, strict=True)), "exact": shares}
        if arguments.json:
            arguments.json.write_text(
                json.dumps({"steps": arguments.steps, "samples": arguments.samples, "anchors": table}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
