"""Rewards divided by their own running standard deviation."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from .groups import dense, group_mean, some_weights, weighted_sum
from .interfaces import Aggregation
from .processes import Devices
from .scores import Scores


@attrs.define(eq=False)
class RunningScale(Aggregation):
    """Sum of scaled rewards, sum_m w_m R_m / s_m, with s_m the running standard deviation of the reward within its groups.

        V_n = mean over samples of (R - mean of its group)^2,   s^2 = (1 - decay) sum_j decay^j V_{n-j} / (1 - decay^{n+1})

    All groups of a step share one scale, unlike with a z-score. So small differences within a group stay small, and a group of equal
    rewards stays equal. The unit of an objective's beta is then 1 / s. The samples are those that the reward applies to; a step in which it
    applies to none is no step of its mean. What it adds elsewhere is as in `Raw`.

    Args:
        weights: by reward name; None weighs each 1, rewards without a weight are logged but not trained on
        decay: decay of the running mean of the variance, per step
        floor: least scale
    """

    weights: Mapping[str, float] | None = attrs.field(default=None, validator=some_weights)
    decay: float = attrs.field(default=0.95, validator=[attrs.validators.ge(0.0), attrs.validators.lt(1.0)])
    floor: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0.0))
    _sums: dict[str, float] = attrs.field(factory=dict, init=False)
    _masses: dict[str, float] = attrs.field(factory=dict, init=False)

    def observe(self, parts: Mapping[str, Tensor], group: Tensor, devices: Devices) -> None:
        scores = Scores.of(parts)
        for name, part in scores.parts.items():
            values, groups = (part, group) if isinstance(part, Tensor) else (part.scores, group[part.applies])
            squares = (values.double() - group_mean(values.double(), groups)).square()
            total, count = devices.sum(torch.stack([squares.sum(), squares.new_tensor(float(len(squares)))])).tolist()
            if count:
                self._masses[name] = self.decay * self._masses.get(name, 0.0) + (1 - self.decay)
                self._sums[name] = self.decay * self._sums.get(name, 0.0) + (1 - self.decay) * total / count

    def scale(self, name: str) -> float:
        """Scale s of a reward, at least `floor`.

        Raises:
            ValueError: the reward has not been observed yet.
        """
        if name not in self._sums:
            raise ValueError(f"RunningScale has not observed the reward {name!r} yet; call observe() with the scores of a step first")
        return max(self.floor, float((self._sums[name] / self._masses[name]) ** 0.5))

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        numbers = dense(parts, group)
        absent = {name for name, part in Scores.of(parts).parts.items() if not isinstance(part, Tensor) and not bool(part.applies.any())}
        scaled = {name: values if name in absent else values / self.scale(name) for name, values in numbers.items()}  # 0 where absent
        return weighted_sum(scaled, self.weights)

    def state(self) -> Mapping[str, Any]:
        return {"sums": dict(self._sums), "weights": dict(self._masses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums = dict(state["sums"])
        # one weight for all rewards stands in checkpoints from before a reward could be without samples in a step
        self._masses = dict(state["weights"]) if "weights" in state else dict.fromkeys(self._sums, float(state["weight"]))
