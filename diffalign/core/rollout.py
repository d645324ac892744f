"""First half of a step: from encoded prompts to scored samples."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import attrs
import torch
from torch import Tensor

from .errors import Evidence, NonFiniteError
from .finite import require_finite
from .interfaces import RewardFunction, StepReward, TrajectorySampler
from .joining import join
from .ledger import Ledger
from .policy import Policy
from .processes import Devices
from .scores import Scores
from .scoring import inner, score, together
from .streams import Streams
from .types import Condition, Progress, Prompt, TrajectoryBatch


@attrs.frozen(eq=False)
class Pictures:
    """Decoded samples.

    Args:
        images: [B, 3, H, W]
        prompts: prompt of each sample
        group: group of each sample, [B]; whole groups where a reward scores all images of a prompt together
        trajectories: forest whose leaves the samples are
    """

    images: Tensor
    prompts: Sequence[Prompt]
    group: Tensor
    trajectories: TrajectoryBatch


@attrs.define(eq=False)
class Stages:
    """Stages that a `Rollout` orders: sampling, decoding and scoring in one step of the run.

    Args:
        policy: policy that decodes
        behavior: policy that rolls out
        role: name of the policy that rolls out
        sampler: draws the trajectories
        rewards: rewards by name
        progress: progress of the run
        streams: random draws of the step
        ledger: takes the costs of sampling and decoding
        chunk: images that are decoded and scored at once
        keep: images of which a copy is kept on the CPU
    """

    policy: Policy
    behavior: Policy
    role: str
    sampler: TrajectorySampler
    rewards: Mapping[str, RewardFunction]
    progress: Progress
    streams: Streams
    ledger: Ledger
    chunk: int
    keep: int
    _kept: list[Tensor] = attrs.field(factory=list, init=False, repr=False)
    _waiting: dict[int, Tensor] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def kept(self) -> Tensor:
        """First `keep` images that were decoded, [n, 3, H, W] on the CPU."""
        return torch.cat(self._kept)

    def sample(self, condition: Condition) -> TrajectoryBatch:
        """Draw the trajectories of some prompts.

        Raises:
            NonFiniteError: they hold a number that is not finite.
            ValueError: the sampler gives something else.
        """
        with self.ledger.stage("rollout", {"policy": self.behavior}):
            trajectories = require_forest(self.sampler, self.sampler.sample(self.behavior, condition, self.progress, self.streams))
        try:
            require_finite(self.role, self.behavior, trajectories, self.progress.step)
        except NonFiniteError as error:
            error.evidence = Evidence.of(self.progress.step, (self.role,), trajectories)
            raise
        return trajectories

    def decode(self, trajectories: TrajectoryBatch) -> Iterator[Pictures]:
        """Decode the leaves of a forest, `chunk` at a time; where a reward scores groups, yield as many as make groups whole.

        Where a reward is a `StepReward`, yield all of them at once, and keep them until `joined`.
        """
        group, prompts = trajectories.group, _prompts(trajectories)
        ends = self._ends(group)
        waiting: list[Tensor] = []
        first = 0
        for start in range(0, len(prompts), self.chunk):
            with self.ledger.stage("decode"):
                images = self.policy.decode(trajectories.samples[start : start + self.chunk])
            missing = self.keep - sum(map(len, self._kept))
            self._kept.append(images[: max(0, missing)].cpu())
            waiting.append(images)
            done = start + len(images)
            end = max((end for end in ends if end <= done), default=0)
            if end <= first:
                continue
            decoded = torch.cat(waiting) if len(waiting) > 1 else images
            if self._of_step:
                self._waiting[id(trajectories)] = decoded
            yield Pictures(decoded[: end - first], prompts[first:end], group[first:end], trajectories)
            waiting, first = [decoded[end - first :]], end

    def _ends(self, group: Tensor) -> set[int]:
        """Numbers of leading samples that may be scored without the samples after them."""
        if self._of_step:
            return {len(group)}
        return _whole(group.tolist()) if together(self.rewards) else set(range(1, len(group) + 1))

    @property
    def _of_step(self) -> dict[str, RewardFunction]:
        """Rewards that score all images of the step at once, however many prompts are sampled at once."""
        return {name: reward for name, reward in self.rewards.items() if isinstance(known := inner(reward), StepReward) and known.whole}

    def score(self, pictures: Pictures) -> Scores:
        """Compute raw scores by reward name, but of no `StepReward`. It changes no state of the step and no ledger, so it may run in
        another thread.

        Raises:
            RewardError: a reward has failed.
        """
        of_step = self._of_step
        return self._scored({name: reward for name, reward in self.rewards.items() if name not in of_step}, pictures)

    def joined(self, condition: Condition, forests: Sequence[TrajectoryBatch], scores: Sequence[Scores]) -> tuple[TrajectoryBatch, Scores]:
        """Put the pieces of a step together, and score its images by each `StepReward`, once. A `Rollout` ends with it.

        Args:
            condition: all prompts
            forests: forests of consecutive pieces of them, all decoded
            scores: scores of the pictures of these forests, in order

        Raises:
            RewardError: a reward has failed.
        """
        whole, known, of_step = join(condition, forests), Scores.joined(scores), self._of_step
        if not of_step:
            return whole, known
        images = [self._waiting.pop(id(forest)) for forest in forests]
        with self.ledger.stage("reward"):
            found = self._scored(of_step, Pictures(torch.cat(images), _prompts(whole), whole.group, whole))
        return whole, Scores({name: (found if name in of_step else known).parts[name] for name in self.rewards})

    def complete(self, trajectories: TrajectoryBatch, scores: Scores) -> tuple[TrajectoryBatch, Scores]:
        """Pass on what a `Rollout` gives.

        Raises:
            ValueError: scores of a reward are missing.
        """
        if missing := [name for name in self.rewards if name not in scores.parts]:
            raise ValueError(f"a Rollout must give the scores of all rewards; it lacks {', '.join(missing)}. End it with `stages.joined`.")
        return trajectories, scores

    def _scored(self, rewards: Mapping[str, RewardFunction], pictures: Pictures) -> Scores:
        try:
            return score(rewards, pictures.images, pictures.prompts, pictures.group, self.progress)
        except NonFiniteError as error:
            error.evidence = Evidence.of(self.progress.step, (self.role,), pictures.trajectories)
            raise


def share_of(prompts: Sequence[Prompt], devices: Devices, policy: Policy) -> Condition:
    """Encode the prompts of a step that a process takes: every `size`-th from its rank on, each with its place among all."""
    share = range(len(prompts))[devices.rank :: devices.size]
    condition = policy.encode([Prompt.of(prompts[place]) for place in share])
    return attrs.evolve(condition, ids=torch.tensor(list(share)))


def _prompts(trajectories: TrajectoryBatch) -> list[Prompt]:
    """Prompts of the leaves of a forest."""
    return [trajectories.condition.prompts[i] for i in trajectories.group.tolist()]


def require_forest(sampler: TrajectorySampler, given: Any) -> TrajectoryBatch:
    """Refuse what a sampler gives if it is no forest.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(given, TrajectoryBatch):
        hint = " Does it end without `return`?" if given is None else ""
        raise ValueError(f"{type(sampler).__name__}.sample must return a TrajectoryBatch; it returned {type(given).__name__}.{hint}")
    return given


class Rollout(ABC):
    """Schedules sampling, decoding and scoring of the prompts of a step; the schedule never changes the result.

    Args:
        prompts: groups that are sampled at once; None takes all
    """

    prompts: int | None = None

    @abstractmethod
    def __call__(self, condition: Condition, stages: Stages) -> tuple[TrajectoryBatch, Scores]:
        """Sample, decode and score all prompts of this process, and end with `stages.joined`. Called without gradients.

        Args:
            condition: P prompts
            stages: the stages to order; time spent in rewards is charged to the stage "reward" of its ledger

        Returns:
            The forest of all prompts; raw scores of its leaves by reward name, each [K].
        """


@attrs.frozen
class Sequential(Rollout):
    """Runs the stages one after the other: all trajectories, then images and scores.

    Args:
        prompts: prompt groups that are sampled and scored at once, before the next ones; None takes all
    """

    prompts: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))

    def __call__(self, condition: Condition, stages: Stages) -> tuple[TrajectoryBatch, Scores]:
        forests: list[TrajectoryBatch] = []
        scores: list[Scores] = []
        for piece in pieces(condition, self.prompts):
            forests.append(stages.sample(piece))
            for pictures in stages.decode(forests[-1]):
                with stages.ledger.stage("reward"):
                    scores.append(stages.score(pictures))
        return stages.joined(condition, forests, scores)


def _whole(group: Sequence[int]) -> set[int]:
    """The numbers of leading samples that make all groups among them whole."""
    last = {number: place for place, number in enumerate(group)}
    reach = accumulate((last[number] for number in group), max)
    return {place + 1 for place, far in enumerate(reach) if far == place}


def pieces(condition: Condition, prompts: int | None) -> Iterator[Condition]:
    """Split a condition into pieces of `prompts` prompts; None gives it whole."""
    if prompts is None or prompts >= len(condition):
        yield condition
        return
    for index in torch.arange(len(condition)).split(prompts):
        yield condition.select(index)
