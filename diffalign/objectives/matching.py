"""Shared code of objectives that match probabilities, of paths or of finished samples, to exp(beta R)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.core import Objective, Outline, Policy, Progress, Scalar

from .path_losses import PathLosses
from .paths import Measure, Paths
from .temperature import Budget, Temperature, felt


class Tempered(Objective):
    """Objective with a temperature, which it adapts to the metrics of each step if it is a budget."""

    beta: Scalar | Budget | float
    _temperature: Temperature

    def require(self, outline: Outline) -> None:
        super().require(outline)
        self._temperature.require(outline)

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        return self._temperature.observe(metrics, progress)

    def state(self) -> Mapping[str, Any]:
        return self._temperature.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._temperature.restore(state)


class PathMatching(Tempered):
    """Objective over paths with a reference and a temperature. A subclass defines the loss that measures the mismatch."""

    reference: Policy | None
    measure: Measure
    _replay: PathLosses

    def policies(self) -> Mapping[str, Policy]:
        return {"policy": self.policy} if self.reference is None else {"policy": self.policy, "reference": self.reference}

    def after_step(self) -> None:
        self._replay.forget()

    def _found_temperature(self) -> Temperature:
        """Build the temperature from `beta`.

        Raises:
            ValueError: beta is not positive and finite, or it is a budget although there is no reference.
        """
        name = type(self).__name__
        temperature = Temperature(self.beta, name)
        if isinstance(self.beta, Budget) and self.measure == "path":
            raise ValueError(f"{name}.beta must be a number or a schedule with measure 'path', which has no reference; got {self.beta}")
        return temperature

    @torch.no_grad()
    def _distance(self, paths: Paths, matched: Tensor, logits: Tensor, share: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics of the distance between the policy and its reference, and of its influence on the loss; empty without a reference.

        Args:
            paths: paths of the batch
            matched: [K] log-probabilities that are matched
            logits: [K] beta R
            share: [K] effective share of their softmax in each sample's group
        """
        if paths.reference is None:
            return {}
        count = torch.tensor(len(paths.group))
        if self.measure == "path":
            return {"log_ratio/reference": (paths.drift(paths.log_prob).sum(), count)}
        kept = self._temperature.spent(matched, share, paths.batch)
        return {"log_ratio/reference": (matched.sum(), count), **felt(matched, logits, paths.group), **kept}
