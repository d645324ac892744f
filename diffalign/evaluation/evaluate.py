"""Held-out evaluation: fixed prompts and noise, any rewards, and diversity.

Legend: P prompts, n samples of each.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    AlignmentLoop,
    Hook,
    Policy,
    Progress,
    Prompt,
    Report,
    RewardFunction,
    Streams,
    log_geometric_mean_distance,
    score,
)
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler

from .pictures import contact_sheet


@attrs.frozen(eq=False)
class Evaluation:
    """What a policy gives for some prompts.

    Args:
        step: training steps done
        prompts: P
        rewards: by name, each [P, n]
        l_gmd: [P] diversity of each prompt's samples (log geometric mean distance of latents)
        images: [P, n, 3, H, W] on the CPU, the first few prompts only
    """

    step: int
    prompts: tuple[Prompt, ...]
    rewards: Mapping[str, Tensor]
    l_gmd: Tensor
    images: Tensor

    def summary(self) -> dict[str, Any]:
        """Means over prompts and samples, and the values by prompt, as plain JSON."""
        return {
            "step": self.step,
            "rewards": {name: values.mean().item() for name, values in self.rewards.items()},
            "l_gmd": self.l_gmd.mean().item(),
            "by_prompt": [
                {
                    "prompt": str(prompt),
                    "l_gmd": self.l_gmd[row].item(),
                    "rewards": {name: values[row].mean().item() for name, values in self.rewards.items()},
                }
                for row, prompt in enumerate(self.prompts)
            ],
        }


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardFunction],
    *,
    samples: int = 4,
    steps: int = 28,
    seed: int = 0,
    step: int = 0,
    rows: int = 128,
    pictures: int = 6,
) -> Evaluation:
    """Sample every prompt deterministically from fixed noise, and score.

    Args:
        policy: what is evaluated
        prompts: P
        rewards: trained on or not, by name
        samples: n per prompt
        steps: denoising steps
        seed: of the noise; equal seeds give equal noise, whatever the policy
        step: training steps done, for the record
        rows: network rows per call, and prompts * samples per round
        pictures: prompts whose images are kept
    """
    sampler = DeterministicSampler(steps=steps, samples=samples)
    streams = Streams(seed)
    scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
    spreads, kept = [], []
    share = max(1, rows // samples)
    for start in range(0, len(prompts), share):
        some = list(prompts[start : start + share])
        condition = attrs.evolve(policy.encode(some), ids=torch.arange(start, start + len(some)))
        trajectories = sampler.sample(policy, condition, Progress(0, 1), streams)
        images = policy.decode(trajectories.samples).cpu()
        repeated = [prompt for prompt in some for _ in range(samples)]
        for name, values in score(rewards, images, repeated).items():
            scores[name].append(values.view(len(some), samples))
        spreads.append(log_geometric_mean_distance(trajectories.samples, trajectories.group).cpu())
        kept.append(images.view(len(some), samples, *images.shape[1:])[: max(0, pictures - start)])
    return Evaluation(
        step, tuple(prompts), {name: torch.cat(values) for name, values in scores.items()}, torch.cat(spreads), torch.cat(kept)
    )


def paired_change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean change over prompts and the half width of its 95 % interval (normal, prompts as units): [P] and [P], or [P, n]."""
    change = (after - before).flatten(1).mean(dim=1) if before.ndim > 1 else after - before
    half = 1.96 * change.std().item() / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return change.mean().item(), half


@attrs.define(eq=False)
class HeldOutEvaluation(Hook):
    """Evaluates before the first step, every `every` steps and after the last, on prompts that are not trained on.

    Writes `evaluation.json` and `images/step-NNNNNN.png` into the run folder; equal prompts and noise throughout.

    Args:
        prompts: a prompt file, as `PromptFile.path`
        every: steps between evaluations; None evaluates before and after only
        samples: per prompt
        steps: denoising steps
        seed: of the noise
        rewards: further rewards by name that are not trained on, beside those of the loop
        pictures: prompts that are drawn
    """

    prompts: str
    every: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    samples: int = attrs.field(default=4, validator=attrs.validators.ge(2))
    steps: int = attrs.field(default=28, validator=attrs.validators.ge(1))
    seed: int = 0
    rewards: Mapping[str, RewardFunction] = attrs.field(factory=dict)
    pictures: int = 6
    results: list[Evaluation] = attrs.field(factory=list, init=False)
    _prompts: list[Prompt] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._prompts = read_prompts(self.prompts)

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._evaluate(loop, step)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        done = report.step + 1
        if self.every is not None and done % self.every == 0 and done < report.total:
            self._evaluate(loop, done)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if error is None and (not self.results or self.results[-1].step != step):
            self._evaluate(loop, step)

    def _evaluate(self, loop: AlignmentLoop, step: int) -> None:
        with loop.ledger.stage("evaluation"):
            result = evaluate(
                loop.evaluation_policy(),
                self._prompts,
                {**loop.named_rewards(), **self.rewards},
                samples=self.samples,
                steps=self.steps,
                seed=self.seed,
                step=step,
                pictures=self.pictures,
            )
        self.results.append(result)
        if loop.folder is not None and loop.devices.rank == 0:
            self._write(loop, result)

    def _write(self, loop: AlignmentLoop, result: Evaluation) -> None:
        assert loop.folder is not None
        file = loop.folder / "evaluation.json"
        entries = json.loads(file.read_text()) if file.exists() else []
        entries = [entry for entry in entries if entry["step"] < result.step] + [result.summary()]
        (loop.folder / "images").mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(entries, indent=1))
        temporary.replace(file)
        sheet = contact_sheet(result.images, [str(prompt) for prompt in result.prompts[: len(result.images)]])
        sheet.save(loop.folder / "images" / f"step-{result.step:06d}.png")
