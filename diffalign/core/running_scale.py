"""Rewards divided by their own running standard deviation."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from .groups import group_mean, weighted_sum
from .interfaces import Aggregation
from .processes import Devices


@attrs.define(eq=False)
class RunningScale(Aggregation):
    """Sum of scaled rewards, sum_m w_m R_m / s_m, with s_m the running standard deviation of the reward within its groups.

        V_n = mean over samples of (R - mean of its group)^2,   s^2 = (1 - decay) sum_j decay^j V_{n-j} / (1 - decay^{n+1})

    All groups of a step share one scale, unlike with a z-score. So small differences within a group stay small, and a group of equal
    rewards stays equal. The unit of an objective's beta is then 1 / s.

    Args:
        weights: by reward name; None weighs each 1, rewards without a weight are logged but not trained on
        decay: decay of the running mean of the variance, per step
        floor: least scale
    """

    weights: Mapping[str, float] | None = None
    decay: float = attrs.field(default=0.95, validator=[attrs.validators.ge(0.0), attrs.validators.lt(1.0)])
    floor: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0.0))
    _sums: dict[str, float] = attrs.field(factory=dict, init=False)
    _weight: float = attrs.field(default=0.0, init=False)

    def observe(self, parts: Mapping[str, Tensor], group: Tensor, devices: Devices) -> None:
        self._weight = self.decay * self._weight + (1 - self.decay)
        for name, values in parts.items():
            squares = (values.double() - group_mean(values.double(), group)).square()
            total, count = devices.sum(torch.stack([squares.sum(), squares.new_tensor(float(len(squares)))])).tolist()
            self._sums[name] = self.decay * self._sums.get(name, 0.0) + (1 - self.decay) * total / count

    def scale(self, name: str) -> float:
        """Scale s of a reward, at least `floor`.

        Raises:
            ValueError: the reward has not been observed yet.
        """
        if name not in self._sums:
            raise ValueError(f"RunningScale has not observed the reward {name!r} yet; call observe() with the scores of a step first")
        return max(self.floor, float((self._sums[name] / self._weight) ** 0.5))

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        return weighted_sum({name: values / self.scale(name) for name, values in parts.items()}, self.weights)

    def state(self) -> Mapping[str, Any]:
        return {"sums": dict(self._sums), "weight": self._weight}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums, self._weight = dict(state["sums"]), float(state["weight"])
