"""Parts that TDM and TDM-R1 share: noised stage ends, the fake score's loss, and predictions with guidance.

Legend: B rows, * latent dimensions.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Condition, Guidance, Loss, Outline, Policy, Streams, UpdateRows
from diffalign.core.guided import evaluations
from diffalign.core.transition import expand
from diffalign.core.words import allowed_word

from ..noising import diffuse, mean_over_dimensions
from .fake_targets import FakeTarget, NoisedEnds
from .intervals import Interval
from .query_times import QueryTime
from .stages import Rows, draw_noise, draw_uniform

Shared = Literal["batch", "group", "sample"]


@attrs.frozen(eq=False)
class Predictor:
    """Clean predictions of a policy, plain and with classifier-free guidance.

    It encodes the negative prompt when it is made: make one for all micro-batches.

    Args:
        policy: policy that predicts
        scale: scale of the guidance; the policy's `no_guidance`, or None, spends no row on it
        negative: the negative prompt
    """

    policy: Policy
    scale: float | None = None
    negative: str = ""
    _guidance: Guidance = attrs.field(init=False, repr=False)

    @_guidance.default
    def _encoded(self) -> Guidance:
        return Guidance.of(self.policy, self.policy.no_guidance if self.scale is None else self.scale, self.negative)

    @property
    def guides(self) -> bool:
        """True if the two predictions differ."""
        return self._guidance.null is not None

    @property
    def calls(self) -> int:
        """Network rows of a prediction: two where it is guided."""
        return evaluations(self.policy) * (1 + self.guides)

    def __call__(self, noised: Tensor, tau: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """f(x_tau, c) and its guided form, each [B, *]; the same tensor where there is no guidance."""
        velocity, guided = self._guidance.velocities(self.policy, noised, tau, condition)
        plain = noised - expand(tau, noised) * velocity
        return plain, noised - expand(tau, noised) * guided if self.guides else plain


@attrs.frozen(eq=False)
class Queries:
    """Draws of the taus and noises at which rows are evaluated.

    Args:
        interval: interval of tau for each stage; no tau lies above the noise that trajectories start from
        times: taus within it
        floor: least tau
        shared: rows with one tau
        noise_by_group: one noise for all samples of a group
        ceiling: largest tau
    """

    interval: Interval
    times: QueryTime
    floor: float = 0.0
    shared: Shared = attrs.field(default="batch", validator=allowed_word)
    noise_by_group: bool = False
    ceiling: float = 1.0

    def __call__(self, rows: Rows, streams: Streams, name: str) -> tuple[Tensor, Tensor]:
        """Taus [B] and unit noises [B, *]."""
        uniform = draw_uniform(streams, f"{name}/time", rows, self.shared)
        tau = self.times(rows.sigma_end.clamp(min=self.floor), self.top(rows.sigma, rows.first), uniform)
        return tau, draw_noise(streams, f"{name}/noise", rows, self.noise_by_group)

    def top(self, sigma: Tensor, first: Tensor) -> Tensor:
        """The largest tau of stages that start at `sigma` [B], on a grid that starts at `first` [B]: [B]."""
        return torch.minimum(self.interval.top(sigma).clamp(max=self.ceiling), first)  # above, a UNet was never trained

    def require(self, sigmas: Tensor, stages: Sequence[int], owner: str) -> None:
        """Refuse a stage for which there is no tau, before one is drawn.

        Args:
            sigmas: [T+1] noise grid
            stages: stages that may be drawn
            owner: who asks, for the message

        Raises:
            ValueError: there is such a stage; the message names the first.
        """
        for stage in stages:
            start, end = sigmas[stage : stage + 1], sigmas[stage + 1 : stage + 2]
            try:
                self.times(end.clamp(min=self.floor), self.top(start, sigmas[:1]), torch.zeros_like(end))
            except ValueError as error:
                where = f"stage {stage} of {len(sigmas) - 1}, from sigma {start.item():.4g} to {end.item():.4g}"
                raise ValueError(f"{owner} finds no noise level for {where}: {error}") from error


def scale_of(given: float | None, policy: Policy, name: str) -> float:
    """The scale of guidance that was given; for None that which is no guidance of the policy.

    Raises:
        ValueError: a scale below that.
    """
    none = policy.no_guidance
    if given is None:
        return none
    if not given >= none:
        raise ValueError(f"{name} must be at least {none:g}, which is no guidance of this {type(policy).__name__}; got {given:g}")
    return given


def random_ends(rows: Rows, streams: Streams, name: str, margin: float, latest: Tensor) -> Rows:
    """Stages ended at a uniform sigma in [s_{j+1}, s_j - margin) instead of at the grid point; where there is no room, at it.

    An end above `latest` [B] is held there, so that there are taus above it.
    """
    room = (rows.sigma - margin - rows.sigma_end).clamp(min=0)
    ends = rows.sigma_end + draw_uniform(streams, f"{name}/end", rows, "batch") * room
    return rows.with_ends(torch.minimum(ends, torch.maximum(latest, rows.sigma_end)))


def evaluated_by_fake(rows: int, regularization: float, outline: Outline) -> UpdateRows:
    """Network rows of one update of the fake: without gradient those of the regularization, and of ends that are replayed before.

    Args:
        rows: stages of a prompt's samples
        regularization: see `fake_losses`
        outline: properties of the trajectories; ends of stochastic ones are replayed
    """
    return UpdateRows((rows,), (rows,) * (bool(regularization) + any(outline.noise_levels)))


def fake_losses(
    fake: Policy,
    teacher: Policy,
    rows: Rows,
    conditions: tuple[Condition, Condition],
    drawn: tuple[Tensor, Tensor],
    target: FakeTarget,
    regularization: float,
    groups: int,
    budget: int | None,
) -> Iterator[Loss]:
    """Regress the fake on the noised ends: weight mean ||v_fake - v*||^2 + regularization mean ||v_fake - v_psi||^2.

    Args:
        fake, teacher: the latter, not guided, as the fake is not, is evaluated only if there is a regularization
        rows: ends of the student as it is now
        conditions: prompts as the fake and as the teacher read them
        drawn: taus [B] and noises [B, *]
        target, regularization: see above
        groups: global number of prompt groups
        budget: rows per micro-batch
    """
    tau, noise = drawn
    noised = diffuse(rows.end, rows.sigma_end, tau, noise)
    aim, weight = target(NoisedEnds(rows.end, rows.clean, rows.sigma_end, tau, noise, noised))
    for index in rows.pieces(budget):
        velocity = fake.velocity(noised[index], tau[index], conditions[0].select(rows.prompt[index]))
        error = mean_over_dimensions((velocity - aim[index]).square())
        per_row = weight[index] * error
        if regularization:
            with torch.no_grad():
                anchor = teacher.velocity(noised[index], tau[index], conditions[1].select(rows.prompt[index]))
            per_row = per_row + regularization * mean_over_dimensions((velocity - anchor).square())
        value = (per_row * rows.share[index]).sum() / groups
        yield Loss(value, {"fake/error": (error.detach().sum(), torch.tensor(len(index)))})
