"""What objectives share that match the probabilities of paths to exp(beta R)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.core import Objective, Policy, Progress, Scalar

from .path_losses import PathLosses
from .paths import Measure, Paths
from .temperature import Budget, Temperature, felt


class PathMatching(Objective):
    """An objective over paths with a reference and a temperature; how far the policy is from the match is its own."""

    reference: Policy | None
    beta: Scalar | Budget | float
    measure: Measure
    _replay: PathLosses
    _temperature: Temperature

    def policies(self) -> Mapping[str, Policy]:
        return {"policy": self.policy} if self.reference is None else {"policy": self.policy, "reference": self.reference}

    def after_step(self) -> None:
        self._replay.forget()

    def observe(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        return self._temperature.observe(metrics, progress)

    def state(self) -> Mapping[str, Any]:
        return self._temperature.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._temperature.restore(state)

    def _found_temperature(self) -> Temperature:
        """The temperature of `beta`.

        Raises:
            ValueError: it is none, or a budget where there is no reference to spend it on.
        """
        name = type(self).__name__
        temperature = Temperature(self.beta, name)
        if isinstance(self.beta, Budget) and self.measure == "path":
            raise ValueError(f"{name}.beta must be a number or a schedule with measure 'path', which knows no reference; got {self.beta}")
        return temperature

    @torch.no_grad()
    def _distance(self, paths: Paths, matched: Tensor, logits: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics of how far the policy is from its reference, and how much that is felt; none without a reference.

        Args:
            paths: of the batch
            matched: [K] what is matched
            logits: [K] beta R
        """
        if paths.reference is None:
            return {}
        count = torch.tensor(len(paths.group))
        if self.measure == "path":
            return {"log_ratio/reference": (paths.drift(paths.log_prob).sum(), count)}
        return {"log_ratio/reference": (matched.sum(), count), **felt(matched, logits, paths.group)}
