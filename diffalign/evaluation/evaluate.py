"""Evaluation with fixed prompts and noise: sampled in rounds, shared by all processes, and continued after an interrupt.

Legend: P prompts, n samples of each.
"""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    Devices,
    Listed,
    Lockstep,
    Policy,
    Progress,
    Prompt,
    RewardFunction,
    Scores,
    SingleProcess,
    Streams,
    log_geometric_mean_distance,
    score,
)
from diffalign.core.demands import require
from diffalign.core.groups import filled
from diffalign.core.processes import Free
from diffalign.core.processes import together as stopped_together
from diffalign.core.scoring import named_rewards, together
from diffalign.samplers import DeterministicSampler

from .diversity import cosine_distance, cosine_distance_across, effective_modes, modes, vendi_score
from .features import Features, PixelFeatures
from .ms_ssim import ms_ssim_distance
from .pictures import merged
from .result import Evaluation
from .rounds import Rounds

DEFAULT_FEATURES: Mapping[str, Features] = {"pixels": PixelFeatures()}
_STEPS = 28
"""Denoising steps of a policy that is trained for no number of its own."""


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt | str] | Listed,
    rewards: RewardFunction | Mapping[str, RewardFunction],
    *,
    features: Mapping[str, Features] = DEFAULT_FEATURES,
    samples: int = 4,
    steps: int | None = None,
    seed: int = 0,
    step: int = 0,
    rows: int = 128,
    pictures: int = 6,
    devices: Devices | None = None,
    lockstep: Lockstep | None = None,
    rounds: Rounds | None = None,
) -> Evaluation:
    """Sample every prompt deterministically from fixed noise, score the samples, and measure diversity.

    A reward that belongs to some sources of prompts alone scores those of them, and is left out where there are none. Where it has no
    score for some samples of a prompt, they are given the mean of the others, which leaves the prompt's mean as it is.

    Prompts that ask for an image size ("height", "width") are sampled size by size. Kept images of several sizes are scaled down to fit one
    canvas.

    With N processes, each takes every N-th prompt and makes the same number of network calls. All return the same result. It does not
    depend on N, except for the rounding of batched arithmetic.

    Args:
        policy: policy to evaluate
        prompts: P prompts, or a source that lists its prompts, such as `PromptFile("file.txt")`
        rewards: trained on or not, by name; one alone has the name of its function or class, as in a run
        features: features by name on which diversity is measured, beside latents and structural similarity
        samples: number n of samples per prompt, at least 2: one sample has no diversity
        steps: denoising steps; None takes those of a few-step student, else 28
        seed: seed of the noise; equal seeds give equal noise for every policy
        step: training steps done, for the record
        rows: network rows per call, and also prompts * samples per round
        pictures: number of prompts whose images are kept
        devices: the processes that share the work; by default only this one
        lockstep: keeps their network calls in step where the weights are sharded over them; in a run it is `loop.lockstep`. None is for
            processes that each have all weights
        rounds: storage of finished rounds, from which an evaluation continues; None keeps none

    Raises:
        ValueError: there are no prompts, or one text in place of a list, or something that is no reward, or one sample per prompt.
        ConfigError: a prompt lacks what a reward needs. Nothing is drawn.
    """
    texts = _listed(prompts)
    if samples < 2:
        raise ValueError(f"samples must be at least 2, because one sample of a prompt has no diversity; got {samples}")
    alone = isinstance(rewards, Mapping) and not rewards  # then diversity is all that is measured
    named = {} if alone else named_rewards(rewards)
    require(named.values(), texts)
    steps = usual_steps(policy) if steps is None else steps
    devices = devices or SingleProcess()
    settings = {"samples": samples, "steps": steps, "seed": seed}
    sizes = [prompt.size for prompt in texts]
    parts: list[tuple[list[int], dict[str, Tensor]]] = []
    for size in dict.fromkeys(sizes):
        ids = [place for place, other in enumerate(sizes) if other == size]
        drawn = sum(place < pictures for place in ids)
        some = tuple(texts[place] for place in ids)
        task = _Task(policy, some, tuple(ids), named, features, samples, steps, seed, rows, -(-drawn // devices.size), devices)
        table = _measured(task, settings, drawn, rounds, lockstep or Free())
        parts.append((ids, {**table, "images": table["images"][:drawn]}))
    table = merged(parts, [size for size in sizes if size is not None])
    images = table.pop("images")
    return _result(step, texts, table, images, settings)


def usual_steps(policy: Policy) -> int:
    """Denoising steps where nobody says how many: the first number of a few-step student, else 28."""
    return next(iter(policy.step_counts), _STEPS)


def _listed(prompts: Sequence[Prompt | str] | Listed) -> tuple[Prompt, ...]:
    """The prompts of a list, or of a source that lists them.

    Raises:
        ValueError: there is none, or it is neither.
    """
    given = prompts.prompts if isinstance(prompts, Listed) else prompts
    if isinstance(given, str):  # a text is a sequence too: of its letters
        raise ValueError(
            f"prompts must be a list of texts, or a source that lists its prompts; got the text {str(given)!r}. Put it in a list: "
            f"{[str(given)]!r}. A file or a shipped list is PromptFile({str(given)!r})."
        )
    if not isinstance(given, Sequence):
        raise ValueError(f"prompts must be a list of texts, or a source that lists its prompts; got {type(given).__name__}")
    if not given:
        raise ValueError("evaluate needs at least one prompt; got none")
    return tuple(map(Prompt.of, given))


def _measured(task: "_Task", settings: Mapping[str, int], pictures: int, rounds: Rounds | None, lockstep: Lockstep) -> dict[str, Tensor]:
    """Measure the prompts of a task, in their order."""
    devices, local = task.devices, -(-len(task.prompts) // task.devices.size)  # equally many in every process; some repeat a prompt
    share = min(max(1, task.rows // task.samples), local)
    kept = None if rounds is None else rounds.under({**settings, **task.names(), "share": share, "pictures": pictures})
    with stopped_together(devices, lockstep):
        known = _known(kept, task, share, local)
    agreed = -int(devices.maximum(torch.tensor(-len(known))))  # sharded weights need the same calls in all processes
    done: list[dict[str, Tensor]] = []
    with stopped_together(devices, lockstep):
        for start in range(0, local, share):
            place = start // share
            done.append(known[place] if place < agreed else task.round(start, min(start + share, local)))
            if kept is not None and place >= agreed:
                kept.save(task.file(place), done[-1])
    return {name: task.gathered(torch.cat([entry[name] for entry in done])) for name in done[0]}


def _known(kept: Rounds | None, task: "_Task", share: int, local: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    for place in range(-(-local // share)):
        tensors = None if kept is None else kept.load(task.file(place))
        if tensors is None:
            break
        found.append(tensors)
    return found


@attrs.frozen(eq=False)
class _Task:
    """Work that all rounds share: prompts of one image size, and their places among all prompts."""

    policy: Policy
    prompts: tuple[Prompt, ...]
    ids: tuple[int, ...]
    rewards: Mapping[str, RewardFunction]
    features: Mapping[str, Features]
    samples: int
    steps: int
    seed: int
    rows: int
    pictures: int  # prompts of this process whose images are kept
    devices: Devices

    def names(self) -> dict[str, object]:
        texts = [[str(prompt), dict(prompt.metadata), *([] if prompt.source is None else [prompt.source])] for prompt in self.prompts]
        return {
            "prompts": texts,
            "ids": self.ids,
            "rewards": sorted(self.rewards),
            "features": {name: repr(each) for name, each in self.features.items()},
        }

    def file(self, place: int) -> str:
        return f"round-{place:05d}-process-{self.devices.rank}-of-{self.devices.size}"

    def round(self, start: int, stop: int) -> dict[str, Tensor]:
        """Evaluate the local prompts `start` .. `stop` - 1. Each tensor has a row per prompt; images has rows for the first few only."""
        places = [(row * self.devices.size + self.devices.rank) % len(self.prompts) for row in range(start, stop)]
        some = [self.prompts[place] for place in places]
        condition = attrs.evolve(self.policy.encode(some), ids=torch.tensor([self.ids[place] for place in places]))
        sampler = DeterministicSampler(steps=self.steps, samples=self.samples, rows=self.rows)
        forest = sampler.sample(self.policy, condition, Progress(0, 1), Streams(self.seed))
        repeated = [prompt for prompt in some for _ in range(self.samples)]
        drawn: list[Tensor] = []
        grouped = together(self.rewards)
        alone = {name: reward for name, reward in self.rewards.items() if name not in grouped}
        scored: list[Scores] = []
        for latents in forest.samples.split(self.rows):
            decoded = self.policy.decode(latents)
            # scored on the policy's device, because a reward's network is there during training already
            first = sum(map(len, drawn))
            scored.append(score(alone, decoded, repeated[first : first + len(decoded)]))
            drawn.append(decoded.cpu())
        images = torch.cat(drawn)
        parts = dict(Scores.joined(scored).parts)
        if grouped:  # they see a prompt's pictures together, however many rows a call has
            whole = images.to(self.policy.device)
            parts |= score({name: self.rewards[name] for name in grouped}, whole, repeated, forest.group.to(whole.device)).parts
        all_scores = Scores(parts)
        scores: dict[str, Tensor] = {}
        for name in self.rewards:
            part = all_scores.partial(name)
            scores |= {f"rewards/{name}": filled(part, forest.group), f"applies/{name}": part.applies.float()}
        vectors = {f"features/{name}": extract(images).float().cpu() for name, extract in self.features.items()}
        by_sample = {name: values.cpu().unflatten(0, (len(some), self.samples)) for name, values in {**scores, **vectors}.items()}
        pictures = images.unflatten(0, (len(some), self.samples))
        return {
            **by_sample,
            "l_gmd": log_geometric_mean_distance(forest.samples, forest.group).cpu(),
            "ms_ssim_distance": ms_ssim_distance(pictures.clamp(0, 1)).cpu(),
            "images": pictures[: max(0, self.pictures - start)].clone(),
        }

    def gathered(self, rows: Tensor) -> Tensor:
        """Collect the rows of all processes in the order of the prompts, without the rows that only filled up."""
        every = self.devices.gather(rows.to(self.policy.device)).cpu()
        ordered: Tensor = every.unflatten(0, (self.devices.size, len(rows))).transpose(0, 1).flatten(0, 1)
        return ordered[: len(self.prompts)]


def _result(step: int, prompts: tuple[Prompt, ...], table: Mapping[str, Tensor], images: Tensor, settings: Mapping[str, int]) -> Evaluation:
    diversity = {name: table[name] for name in ("l_gmd", "ms_ssim_distance")}
    across: dict[str, float] = {}
    for name, vectors in table.items():
        kind, _, name = name.partition("/")  # noqa: PLW2901
        if kind == "features":
            diversity[f"cosine/{name}"] = cosine_distance(vectors)
            diversity[f"vendi/{name}"] = vendi_score(vectors)
            diversity[f"modes/{name}"] = torch.stack([effective_modes(modes(rows)) for rows in vectors])
            if len(vectors) > 1:  # one prompt is not different from another
                across[f"cosine/{name}"] = cosine_distance_across(vectors).item()
            across[f"vendi/{name}"] = vendi_score(vectors.flatten(0, 1)).item()
    rewards: dict[str, Tensor] = {}
    scored: dict[str, Tensor] = {}
    applies: dict[str, Tensor] = {}
    for name in (name.removeprefix("rewards/") for name in table if name.startswith("rewards/")):
        there = table[f"applies/{name}"] > 0
        known = there.any(dim=1)  # samples without a score have the mean of the others of their prompt
        if bool(known.any()):
            rewards[name] = table[f"rewards/{name}"][known]
            scored |= {} if bool(known.all()) else {name: known}
            applies |= {} if bool(there[known].all()) else {name: there[known]}
    return Evaluation(step, prompts, rewards, diversity, across, images, settings, scored=scored, applies=applies)
