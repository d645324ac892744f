"""Shared code of objectives that match log-ratios of finished samples, estimated by their denoising errors, to beta R."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from diffalign.core import Follower, Loss, Policy, ScoredBatch, group_sum

from .elbo import ELBO, Estimates
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .matching import Tempered
from .noised import Noised
from .requirements import given_reference
from .temperature import KLBudget, felt
from .terms import effective_share


class ELBOMatching(Tempered, ForwardObjective):
    """Objective over finished samples with a reference and a temperature. A subclass defines the mismatch.

    Each log-ratio is estimated twice from independent noise, see `_mismatch`.
    """

    reference: Policy | None
    bound: ELBO
    rows: int | None

    def _held(self, name: str) -> ForwardLosses:
        """Make the default reference, and what draws the noise.

        Args:
            name: name of the random draws

        Raises:
            ValueError: the reference is trainable, or a budget of nats is given to a bound that has none.
        """
        if isinstance(self.beta, KLBudget) and self.bound.weighting != "likelihood":
            raise ValueError(
                f"{type(self).__name__}.beta: KLBudget counts nats, and errors weighted by {self.bound.weighting!r} are none. Take "
                "bound.weighting: likelihood, or EffectiveSamples, which needs no unit."
            )
        self.reference = given_reference(self.policy, self.reference)
        return ForwardLosses(self.policy, None, Follower(0.0), Estimates(self.bound), name, type(self).__name__)

    @abstractmethod
    def _mismatch(self, one: Tensor, other: Tensor, logits: Tensor, group: Tensor) -> Tensor:
        """Loss of each sample, whose mean gradient is that of the mismatch: [K].

        Args:
            one: [K] estimate of the log-ratio s of each sample, with its gradient
            other: [K] another estimate from independent noise, with its gradient
            logits: [K] beta R
            group: [K] prompt group of each sample
        """

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        assert self.reference is not None
        forward = self._forward.draw(batch, update, self.rows)
        baseline = forward.errors(self.reference, "reference")

        def evaluate(noised: Noised, units: Tensor) -> dict[str, Tensor]:
            return {"error": noised.error(noised.velocity(self.policy))}

        yield from forward.coupled(evaluate, lambda values: self._loss(forward, values, baseline))

    def _loss(self, forward: ForwardBatch, values: Mapping[str, Tensor], baseline: Tensor) -> Loss:
        batch, group = forward.batch, forward.batch.trajectories.group
        forward.samples.require_finite(values["error"], torch.arange(len(forward)), "policy")
        one, other = self.bound.log_ratio(forward, baseline, values["error"])
        beta = self._temperature(batch.progress)
        logits = beta * batch.rewards.double()
        per_sample = self._mismatch(one, other, logits, group)
        value = (per_sample / group_sum(torch.ones_like(per_sample), group)).sum() / batch.groups
        ratio, count = (one + other).detach() / 2, torch.tensor(len(group))
        share = effective_share(logits, group)
        metrics = {
            "loss": forward.reported(value, len(forward)),
            "beta": (torch.tensor(beta, dtype=torch.float64), torch.tensor(1)),
            "ess/target": (share.sum(), count),
            "ess/policy": (effective_share(ratio, group).sum(), count),
            "log_ratio/reference": (ratio.sum(), count),
            "log_ratio/noise": (((one - other).detach().square() / 4).sum(), count),
            **felt(ratio, logits, group),
            **self._temperature.spent(ratio, share, batch),
        }
        return Loss(value, metrics)
