"""Inverse temperature of an objective: a number, a schedule, or a budget that finds it while training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import Outline, Progress, Scalar, ScoredBatch, group_mean, group_std, scalar
from diffalign.core.number_fields import require_number

from .requirements import group_has_spread, require_positive

LIMITS = (1e-2, 1e4)
"""Limits between which a budget searches beta, in nats per unit of reward."""

FELT = 0.01
"""Ratio of two standard deviations, log-ratio over beta R, below which the reference has no influence."""

_WATCHED = 0.1
"""Share of a run after which the user is told."""


def _finite(value: float, name: str, meaning: str, kinds: str = "a number") -> None:
    require_number(name, value, kinds)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite: it is {meaning}; got {value:g}")


class Budget(ABC):
    """Target for the aligned policy, given instead of a temperature. Beta rises while the budget is not used up, else it falls."""

    start: float
    """Value of beta at the first step."""

    rate: float
    """Largest lasting change of log beta in a step."""

    gain: float
    """Largest temporary change of log beta, which follows the room of the step before."""

    @abstractmethod
    def room(self, metrics: Mapping[str, float]) -> float:
        """Share of the budget that is left: 1 if nothing is used, below 0 if too much is used."""

    def used(self, log_ratio: Tensor, share: Tensor, batch: ScoredBatch) -> tuple[Tensor, Tensor] | None:
        """Measure what each sample has used, and say which samples count; None if `room` reads other metrics alone.

        The mean over those that count, over all micro-batches and processes, is the metric `budget/used`, which `room` may read; their
        share of all samples is `budget/samples`. In a step in which none counts, or all groups have equal rewards, beta stays.

        Args:
            log_ratio: [K] log p(tau) - log p_ref(tau), nats
            share: [K] effective share of the target softmax(beta R) of each sample's group
            batch: the scored batch

        Returns:
            [K] numbers, and [K] bool.
        """
        return None

    def require(self, samples: int, owner: str) -> None:  # noqa: B027  a hook with a default
        """Refuse a budget that no beta can meet with `samples` of each prompt.

        Raises:
            ValueError: none can.
        """


@attrs.frozen
class KLBudget(Budget):
    """Finds the beta at which the policy is `nats` nats away from its reference.

        e = clip((nats - KL) / nats, -1, 1),        b <- b exp(rate e),        beta = b exp(gain e)

    with KL the mean of log p(tau) - log p_ref(tau) over the trajectories of a step. b follows dual ascent on the constraint KL <= nats,
    in log b. The policy follows beta only over many steps, so dual ascent alone would oscillate; the factor exp(gain e) reacts at once.

    Trajectories of a prompt that no reward scores (`rewards: []`) do not count: there the policy is only held. Those of a group of equal
    rewards do, because the nats are spent there as well. In a step in which no group has different rewards beta stays: at every beta the
    target is then the reference, so nats that are left do not say that beta is too small.

    Args:
        nats: KL(policy || reference) of a path, > 0
        start: b of the first step
        rate: rate of the dual ascent, see above
        gain: gain of the immediate reaction, see above

    Raises:
        ValueError: an argument is not positive and finite.
    """

    nats: float
    start: float = 20.0
    rate: float = 0.02
    gain: float = 2.0

    def __attrs_post_init__(self) -> None:
        _finite(self.nats, "KLBudget.nats", "how far the policy may go")
        _finite(self.start, "KLBudget.start", "a temperature")
        _finite(self.rate, "KLBudget.rate", "a step of log beta")
        _finite(self.gain, "KLBudget.gain", "an answer of log beta")

    def room(self, metrics: Mapping[str, float]) -> float:
        return (self.nats - metrics.get("budget/used", metrics["log_ratio/reference"])) / self.nats

    def used(self, log_ratio: Tensor, share: Tensor, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
        if batch.complete:  # nothing is waited for
            return log_ratio, torch.ones_like(log_ratio, dtype=torch.bool)
        # whole groups: the log-ratios of the scored samples alone would be no estimate of the KL
        return log_ratio, group_mean(batch.scored.double(), batch.trajectories.group) > 0


@attrs.frozen
class EffectiveSamples(Budget):
    """Finds the beta at which the target q covers a given share of the samples of a group.

        beta <- beta exp(rate clip((ESS - share) / share, -1, 1)),        ESS = 1 / (K sum_i q_i^2),   q = softmax(beta R)

    So the scale of rewards does not matter. With share 0.5 and nine samples, the target covers four or five of them.

    ESS is the mean over the groups whose rewards differ. The target of equal rewards, or of none, is uniform at every beta, so such groups
    do not count. In a step without any other beta stays.

    Args:
        share: share of the samples, above 1 / K and below 1
        start: beta of the first step
        rate: largest change of log beta in a step

    Raises:
        ValueError: the share is outside (0, 1), or another number is not positive and finite.
    """

    share: float = 0.5
    start: float = 20.0
    rate: float = 0.1
    gain: float = attrs.field(default=0.0, init=False)  # the target reacts to beta at once, so it needs no gain

    def __attrs_post_init__(self) -> None:
        require_number("EffectiveSamples.share", self.share)
        if not 0 < self.share < 1:
            raise ValueError(
                f"EffectiveSamples.share must lie between 0 and 1, both excluded: it is a share of samples; got {self.share:g}"
            )
        _finite(self.start, "EffectiveSamples.start", "a temperature")
        _finite(self.rate, "EffectiveSamples.rate", "a step of log beta")

    def room(self, metrics: Mapping[str, float]) -> float:
        return (metrics.get("budget/used", metrics["ess/target"]) - self.share) / self.share

    def used(self, log_ratio: Tensor, share: Tensor, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
        return share, group_has_spread(batch.rewards, batch.trajectories.group)

    def require(self, samples: int, owner: str) -> None:
        if self.share * samples <= 1:
            raise ValueError(
                f"{owner}.beta: EffectiveSamples.share must lie above 1 / {samples} with {samples} samples of a prompt, because a target "
                f"covers at least one of them; got {self.share:g}"
            )


@attrs.define(eq=False)
class Temperature:
    """Present value of beta during a run, in nats of log-probability per unit of aggregated reward.

    Args:
        source: number, schedule or budget that gives beta
        owner: name of the objective in messages

    Raises:
        ValueError: a number is not positive and finite.
    """

    source: Scalar | Budget | float
    owner: str
    _found: float = attrs.field(default=0.0, init=False)  # beta that the budget has found
    _answer: float = attrs.field(default=0.0, init=False)  # room of the step before, from -1 to 1
    _felt: float = attrs.field(default=0.0, init=False)  # largest influence of the reference so far
    _wanted: float = attrs.field(default=0.0, init=False)  # largest standard deviation of beta R so far
    _ended: bool = attrs.field(default=False, init=False)  # a budget was at an end of its range

    def __attrs_post_init__(self) -> None:
        if isinstance(self.source, Budget):
            self._found = self.source.start
        elif not isinstance(self.source, Scalar):
            _finite(self.source, f"{self.owner}.beta", "an inverse temperature", "a number, a schedule or a budget")

    def __call__(self, progress: Progress) -> float:
        """Value of beta at this step.

        Raises:
            ValueError: a schedule gives a value that is not positive.
        """
        if isinstance(self.source, Budget):
            return self._found * math.exp(self.source.gain * self._answer)
        beta = scalar(self.source)(progress)
        require_positive(beta, f"{self.owner}.beta", "it is an inverse temperature")
        return beta

    def require(self, outline: Outline) -> None:
        """Refuse a budget that cannot be met by the samples of a rollout.

        Raises:
            ValueError: it cannot.
        """
        if isinstance(self.source, Budget):
            self.source.require(outline.samples, self.owner)

    @torch.no_grad()
    def spent(self, log_ratio: Tensor, share: Tensor, batch: ScoredBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics that a budget is kept by, `budget/used` and `budget/samples`: sums and counts by name; empty without a budget.

        Args:
            log_ratio: [K] log p(tau) - log p_ref(tau), nats
            share: [K] effective share of the target softmax(beta R) of each sample's group
            batch: the scored batch
        """
        used = self.source.used(log_ratio, share, batch) if isinstance(self.source, Budget) else None
        if used is None:
            return {}
        numbers, counts = used
        share = counts.double().sum()
        return {
            "budget/used": (torch.where(counts, numbers, 0.0).sum(), share),
            "budget/samples": (share, torch.tensor(len(counts))),
        }

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Look at the metrics of a step, taken over all processes.

        Returns:
            A message for the user: once, after a tenth of the run, if the reference has had no influence so far; once, where a budget
            comes to an end of its range; else None.
        """
        # where all rewards are equal no beta spends anything, so what is left says nothing of beta
        if isinstance(self.source, Budget) and metrics.get("budget/samples", 1.0) > 0 and metrics.get("target/spread", 1.0) > 0:
            low, high = LIMITS
            self._answer = max(-1.0, min(1.0, self.source.room(metrics)))
            self._found = max(low, min(high, self._found * math.exp(self.source.rate * self._answer)))
            if self._found in LIMITS and not self._ended:
                self._ended = True
                less = "less" if self._found == low else "more"
                return (
                    f"{self.owner}: {self.source} has brought beta to {self._found:g} nats per unit of reward, the end of its range, and "
                    f"would take {less}. Rewards may be so large or so small that no such beta meets it."
                )
        if "reference/felt" not in metrics:
            return None
        self._felt = max(self._felt, metrics["reference/felt"])
        self._wanted = max(self._wanted, metrics["target/spread"])
        if not (progress.step - 1) / progress.total < _WATCHED <= progress.step / progress.total:
            return None
        # equal rewards ask for nothing, which the run says by itself; a budget finds its temperature by itself
        if self._wanted == 0 or self._felt >= FELT or isinstance(self.source, Budget):
            return None
        return (
            f"{self.owner}: the reference has no influence. Within a group the log-ratio to it differs by "
            f"{metrics['log_ratio/spread']:.2g} nats, but beta R by {metrics['target/spread']:.3g}, so this run maximises the reward as if "
            f"there were no reference. Write a smaller objective.beta (now {metrics['beta']:.3g} nats per unit of reward; 5 to 40 is usual "
            "if rewards differ by about 1), or objective.beta: {class_path: KLBudget, init_args: {nats: 10}}. Or the learning rate is so "
            "small that nothing has moved yet."
        )

    def state(self) -> dict[str, Any]:
        """Numbers that the messages depend on, and the beta that a budget has found."""
        seen = {"felt": self._felt, "wanted": self._wanted, "ended": self._ended}
        return {"beta": self._found, "answer": self._answer, **seen} if isinstance(self.source, Budget) else seen

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        if isinstance(self.source, Budget):
            # a number may have stood in its place until now: then it begins at its start
            self._found, self._answer = float(state.get("beta", self.source.start)), float(state.get("answer", 0.0))
        # older checkpoints hold nothing of these
        self._felt, self._wanted = float(state.get("felt", 0.0)), float(state.get("wanted", 0.0))
        self._ended = bool(state.get("ended", False))


def felt(drift: Tensor, logits: Tensor, group: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of the influence of the reference: sums and counts by name.

        log_ratio/spread   mean over groups of std_group(log p(tau) - log p_ref(tau)), nats
        target/spread      mean over groups of std_group(beta R), nats
        reference/felt     the first over the second; not counted if no group has different rewards

    Args:
        drift: [K] log p(tau) - log p_ref(tau), nats
        logits: [K] beta R
        group: [K]
    """
    count = torch.tensor(len(group))
    # both at once, as separate groups: counting groups makes the host wait for an accelerator
    moved, wanted = group_std(torch.cat([drift, logits]), torch.cat([2 * group, 2 * group + 1])).view(2, -1).sum(dim=1)
    differs = (wanted > 0).to(wanted)
    return {
        "log_ratio/spread": (moved, count),
        "target/spread": (wanted, count),
        "reference/felt": (differs * moved / wanted.clamp(min=1e-300) * count, differs * count),
    }
