"""The inverse temperature of an objective: a number, a schedule, or a budget that finds it while training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import Progress, Scalar, group_std, scalar

from .requirements import require_positive

LIMITS = (1e-2, 1e4)
"""Nats between which a budget looks for beta."""

FELT = 0.01
"""Spread of the log-ratio over that of beta R below which the reference does not matter."""

_WATCHED = 0.1
"""Share of a run after which it is told."""


def _finite(value: float, name: str, meaning: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite: it is {meaning}; got {value:g}")


class Budget(ABC):
    """A wish about the aligned policy, in place of a temperature: beta rises while there is room, and falls where there is none."""

    start: float
    """Beta of the first step."""

    rate: float
    """Largest change of log beta in a step that stays."""

    gain: float
    """Largest change of log beta that passes with what it answers."""

    @abstractmethod
    def room(self, metrics: Mapping[str, float]) -> float:
        """The share of the budget that is left: 1 where nothing is spent, below 0 where too much is."""


@attrs.frozen
class KLBudget(Budget):
    """Finds the beta at which the policy is so many nats away from its reference.

        e = clip((nats - KL) / nats, -1, 1),        b <- b exp(rate e),        beta = b exp(gain e)

    with KL the mean of log p(tau) - log p_ref(tau) over the trajectories of a step. The first line is dual ascent on the constraint
    KL <= nats, in log b. The policy follows beta over many steps, so dual ascent alone swings; the second factor answers at once.

    Args:
        nats: KL(policy || reference) of a path, > 0
        start: b of the first step
        rate: see above
        gain: see above

    Raises:
        ValueError: one of them is not positive and finite.
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
        return (self.nats - metrics["log_ratio/reference"]) / self.nats


@attrs.frozen
class EffectiveSamples(Budget):
    """Finds the beta at which the target spreads over a share of the samples of a group.

        beta <- beta exp(rate clip((ESS - share) / share, -1, 1)),        ESS = 1 / (K sum_i q_i^2),   q = softmax(beta R)

    Rewards then need no scale: 0.5 of nine samples is a target that is spread over four or five of them.

    Args:
        share: of the samples, above 0 and below 1
        start: beta of the first step
        rate: largest change of log beta in a step

    Raises:
        ValueError: a share outside of (0, 1), or another number that is not positive and finite.
    """

    share: float = 0.5
    start: float = 20.0
    rate: float = 0.1
    gain: float = attrs.field(default=0.0, init=False)  # the target answers beta at once

    def __attrs_post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(
                f"EffectiveSamples.share must lie between 0 and 1, both excluded: it is a share of samples; got {self.share:g}"
            )
        _finite(self.start, "EffectiveSamples.start", "a temperature")
        _finite(self.rate, "EffectiveSamples.rate", "a step of log beta")

    def room(self, metrics: Mapping[str, float]) -> float:
        return (metrics["ess/target"] - self.share) / self.share


@attrs.define(eq=False)
class Temperature:
    """Beta while a run goes on: nats of log-probability per unit of aggregated reward.

    Args:
        source: where it comes from
        owner: the objective, for messages

    Raises:
        ValueError: a number that is not positive and finite.
    """

    source: Scalar | Budget | float
    owner: str
    _found: float = attrs.field(default=0.0, init=False)  # by a budget
    _answer: float = attrs.field(default=0.0, init=False)  # to what was left of it in the step before, from -1 to 1
    _felt: float = attrs.field(default=0.0, init=False)  # at most, so far
    _wanted: float = attrs.field(default=0.0, init=False)  # spread of beta R at most, so far

    def __attrs_post_init__(self) -> None:
        if isinstance(self.source, Budget):
            self._found = self.source.start
        elif not isinstance(self.source, Scalar):
            _finite(self.source, f"{self.owner}.beta", "an inverse temperature")

    def __call__(self, progress: Progress) -> float:
        """Beta at this step.

        Raises:
            ValueError: a schedule gives what is not positive.
        """
        if isinstance(self.source, Budget):
            return self._found * math.exp(self.source.gain * self._answer)
        beta = scalar(self.source)(progress)
        require_positive(beta, f"{self.owner}.beta", "it is an inverse temperature")
        return beta

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """See the metrics of a step, over all processes.

        Returns:
            What the user should know: once, after a tenth of the run, that the reference has not been felt.
        """
        if isinstance(self.source, Budget):
            low, high = LIMITS
            self._answer = max(-1.0, min(1.0, self.source.room(metrics)))
            self._found = max(low, min(high, self._found * math.exp(self.source.rate * self._answer)))
        if "reference/felt" not in metrics:
            return None
        self._felt = max(self._felt, metrics["reference/felt"])
        self._wanted = max(self._wanted, metrics["target/spread"])
        if not (progress.step - 1) / progress.total < _WATCHED <= progress.step / progress.total:
            return None
        if self._wanted == 0:
            return (
                f"{self.owner}: the rewards of every group have been equal so far, so nothing has moved. Look at the pictures and at the "
                "reward: it may not see what they differ in, or all of them may be as bad."
            )
        if self._felt >= FELT or isinstance(self.source, Budget):  # which finds its temperature
            return None
        return (
            f"{self.owner}: the reference is not felt. Within a group the log-ratio to it differs by {metrics['log_ratio/spread']:.2g} "
            f"nats, beta R by {metrics['target/spread']:.3g}, so this run maximises the reward as without a reference. Write a smaller "
            f"objective.beta (now {metrics['beta']:.3g} nats per unit of reward; 5 to 40 is usual where rewards differ by about 1), or "
            "objective.beta: {class_path: KLBudget, init_args: {nats: 10}}. Or the learning rate is so small that nothing has moved yet."
        )

    def state(self) -> dict[str, Any]:
        """The beta that a budget has found; empty for others."""
        return {"beta": self._found, "answer": self._answer} if isinstance(self.source, Budget) else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        if isinstance(self.source, Budget):
            self._found, self._answer = float(state["beta"]), float(state["answer"])


def felt(drift: Tensor, logits: Tensor, group: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of how much the reference matters: sums and counts by name.

        log_ratio/spread   mean over groups of std_group(log p(tau) - log p_ref(tau)), nats
        target/spread      mean over groups of std_group(beta R), nats
        reference/felt     the first over the second; without weight where no group has different rewards

    Args:
        drift: [K] log p(tau) - log p_ref(tau), nats
        logits: [K] beta R
        group: [K]
    """
    count = torch.tensor(len(group))
    # both at once, as groups of their own: counting groups makes the host wait for an accelerator
    moved, wanted = group_std(torch.cat([drift, logits]), torch.cat([2 * group, 2 * group + 1])).view(2, -1).sum(dim=1)
    differs = (wanted > 0).to(wanted)
    return {
        "log_ratio/spread": (moved, count),
        "target/spread": (wanted, count),
        "reference/felt": (differs * moved / wanted.clamp(min=1e-300) * count, differs * count),
    }
