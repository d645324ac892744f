"""The stages of a batch of few-step trajectories, as rows.

Legend: K samples, T stages, B rows (samples x drawn stages), * latent dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import attrs
import torch
from torch import Tensor

from diffalign.core import ROOT, Condition, Policy, ScoredBatch, Streams, TrajectoryBatch
from diffalign.core.transition import expand

from .stage_samplers import StageSampler

DrawnBy = Literal["step", "prompt"]
"""Unit that has stages of its own: the step, or each prompt."""


@attrs.frozen(eq=False)
class Rows:
    """Stage j of sample i, for some stages and all samples.

    Args:
        start, end: [B, *] x_j and x_{j+1}
        sigma, sigma_end: [B] s_j and s_{j+1}
        stage: [B] j
        draw: [B] which of the drawn stages the row belongs to
        sample: [B] index into the leaves
        prompt: [B] index into the condition
        prompt_id: [B] its global id
        place: [B] index of the sample within its group
        share: [B] weight of the row, such that a sum over rows is the mean over draws and over the samples of a group
        first: [B] s_0, the most noise of the trajectory
    """

    start: Tensor
    end: Tensor
    sigma: Tensor
    sigma_end: Tensor
    stage: Tensor
    draw: Tensor
    sample: Tensor
    prompt: Tensor
    prompt_id: Tensor
    place: Tensor
    share: Tensor
    first: Tensor

    @classmethod
    def of(cls, trajectories: TrajectoryBatch, stages: Sequence[int]) -> Self:
        """The rows of some stages, in the order in which they were drawn.

        Raises:
            ValueError: some levels of the trajectories are not stored.
        """
        return cls.by_prompt(trajectories, [stages] * len(trajectories.condition))

    @classmethod
    def by_prompt(cls, trajectories: TrajectoryBatch, stages: Sequence[Sequence[int]]) -> Self:
        """The rows of stages that every prompt has of its own, equally many for each.

        Args:
            trajectories: with every level stored
            stages: stages of each prompt of the condition

        Raises:
            ValueError: some levels of the trajectories are not stored.
        """
        paths = trajectories.paths
        if paths.shape[1] != len(trajectories.sigmas) or bool((paths == ROOT).any()):
            raise ValueError(
                f"few-step training needs every level of a trajectory; this batch stores at most {paths.shape[1]} of "
                f"{len(trajectories.sigmas)}. Use DeterministicSampler."
            )
        count, device = len(paths), paths.device
        group = trajectories.group
        sizes = torch.bincount(group)
        table = torch.tensor([list(some) for some in stages], device=device)  # [P, S]
        draws = table.shape[1]
        sample = torch.arange(count, device=device).repeat(draws)
        draw = torch.arange(draws, device=device).repeat_interleave(count)
        stage = table[group[sample], draw]
        order = group.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(count, device=device) - (sizes.cumsum(0) - sizes)[group[order]]
        ids = trajectories.condition.ids.to(device)
        return cls(
            start=trajectories.latents[paths[sample, stage]],
            end=trajectories.latents[paths[sample, stage + 1]],
            sigma=trajectories.sigmas[stage],
            sigma_end=trajectories.sigmas[stage + 1],
            stage=stage,
            draw=draw,
            sample=sample,
            prompt=group[sample],
            prompt_id=ids[group[sample]],
            place=place[sample],
            share=1 / (draws * sizes[group[sample]]).to(trajectories.sigmas.dtype),
            first=trajectories.sigmas[torch.zeros_like(stage)],
        )

    def __len__(self) -> int:
        return len(self.start)

    @property
    def group(self) -> Tensor:
        """[B] samples of one prompt at one drawn stage: what is compared."""
        return self.draw * (self.prompt.max() + 1) + self.prompt

    @property
    def clean(self) -> Tensor:
        """[B, *] the clean prediction xhat0 of the step that led from `start` to `end`."""
        return clean_of(self.start, self.end, self.sigma, self.sigma_end)

    def weights(self, by_stage: bool, batch: ScoredBatch) -> Tensor:
        """[B] shares of a mean over prompts; those of stage j times (j + 1) / T, where `by_stage` says so."""
        stages = len(batch.trajectories.sigmas) - 1
        weight = (self.stage + 1) / stages if by_stage else torch.ones_like(self.share)
        return weight * self.share / batch.groups

    def select(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        return Rows(**{field.name: getattr(self, field.name)[index] for field in attrs.fields(Rows)})

    def with_ends(self, sigma_end: Tensor) -> "Rows":
        """The same steps, ended at other sigmas [B] below their starts."""
        velocity = (self.start - self.end) / expand(self.sigma - self.sigma_end, self.start)
        return attrs.evolve(self, end=self.start - expand(self.sigma - sigma_end, self.start) * velocity, sigma_end=sigma_end)

    def replay(self, policy: Policy, condition: Condition) -> tuple[Tensor, Tensor]:
        """The ends and clean predictions [B, *] of these stages under the weights of `policy`, by the step of the rollout."""
        still = torch.zeros_like(self.sigma)
        end = policy.transition(self.start, self.sigma, self.sigma_end, condition.select(self.prompt), still).mean
        return end, clean_of(self.start, end, self.sigma, self.sigma_end)

    def replayed(self, policy: Policy, condition: Condition, budget: int | None) -> "Rows":
        """Return these rows with the ends that `policy` gives now, without gradient."""
        with torch.no_grad():
            ends = [self.select(index).replay(policy, condition)[0] for index in self.pieces(budget)]
        return attrs.evolve(self, end=torch.cat(ends))

    def pieces(self, budget: int | None) -> Iterator[Tensor]:
        """Indices of at most `budget` rows at a time; None takes all."""
        yield from torch.arange(len(self), device=self.start.device).split(budget or len(self))


def drawn_rows(trajectories: TrajectoryBatch, sampler: StageSampler, streams: Streams, name: str, by: DrawnBy) -> Rows:
    """The rows of the stages of a step.

    Args:
        trajectories: with every level stored
        sampler: sampler of stages
        streams: random draws of the step
        name: name of the draw
        by: one draw for all prompts, or one for each, which depends on no other prompt
    """
    stages = len(trajectories.sigmas) - 1
    if by == "step":
        return Rows.of(trajectories, sampler.draw(stages, streams.generator(name)))
    ids = trajectories.condition.ids.tolist()
    return Rows.by_prompt(trajectories, [sampler.draw(stages, streams.generator(name, prompt)) for prompt in ids])


def clean_of(start: Tensor, end: Tensor, sigma: Tensor, sigma_end: Tensor) -> Tensor:
    """xhat0 = x_j - s_j (x_j - x_{j+1}) / (s_j - s_{j+1}): the clean prediction behind a deterministic step."""
    return start - expand(sigma / (sigma - sigma_end), start) * (start - end)


def draw_uniform(streams: Streams, name: str, rows: Rows, shared: str) -> Tensor:
    """Numbers in [0, 1) for rows: one for each drawn stage ("batch"), each group ("group") or each row ("sample"): [B]."""
    places = _Places.of(rows, by_group=shared == "group")
    if shared == "batch":
        values = torch.from_numpy(streams.generator(name).random(places.draws))[places.draw]
    else:
        values = places.look_up(lambda key, count: torch.from_numpy(streams.generator(name, key).random((places.draws, count))))
    return values.to(rows.sigma)


def draw_noise(streams: Streams, name: str, rows: Rows, by_group: bool = False) -> Tensor:
    """Unit noise for rows [B, *]: independent, or one draw for all samples of a group."""
    shape, places = rows.start.shape[1:], _Places.of(rows, by_group)
    return places.look_up(lambda key, count: streams.normal((places.draws, count, *shape), name, key, 0)).to(rows.start)


@attrs.frozen(eq=False)
class _Places:
    """Places of the draws of rows in tables, on the host: prompt id, draw and place of each row [B]."""

    prompt_id: Tensor
    draw: Tensor
    place: Tensor

    @classmethod
    def of(cls, rows: Rows, by_group: bool) -> "_Places":
        place = torch.zeros_like(rows.place) if by_group else rows.place
        return cls(*torch.stack([rows.prompt_id, rows.draw, place]).cpu())

    @property
    def draws(self) -> int:
        return int(self.draw.max()) + 1

    def look_up(self, table: Callable[[int, int], Tensor]) -> Tensor:
        """Entries [draw, place] of one table per prompt id: groups stay whole, so other prompts and processes change nothing."""
        result: Tensor | None = None
        for prompt_id in self.prompt_id.unique().tolist():
            mine = (self.prompt_id == prompt_id).nonzero().squeeze(1)
            values = table(prompt_id, int(self.place[mine].max()) + 1)[self.draw[mine], self.place[mine]]
            if result is None:
                result = values.new_empty((len(self.draw), *values.shape[1:]))
            result[mine] = values
        assert result is not None
        return result
