"""What objectives share that match the probabilities of paths to exp(beta R)."""

from collections.abc import Mapping
from typing import Any

from diffalign.core import Objective, Policy, Progress

from .path_losses import PathLosses
from .temperature import Temperature


class PathMatching(Objective):
    """An objective over paths with a reference and a temperature; how far the policy is from the match is its own."""

    reference: Policy | None
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
