"""Reach of the reward of TDM-R1: stages, how strongly, and between which sigmas.

Legend: B rows, T stages.
"""

import math
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from .stages import Rows


@attrs.frozen
class Reach:
    """Stages of the generator's reward term.

    Args:
        stages: it reaches those below this number; None all
        weights: its factor at each stage; None is 1 everywhere
        ceiling: largest sigma that is asked for; it does not reach stages whose ends are not below
    """

    stages: int | None
    weights: Sequence[float] | None
    ceiling: float

    def split(self, rows: Rows, stages: int) -> Iterator[tuple[Rows, bool, Tensor]]:
        """Rows that the reward reaches, and rows that it does not, each with its factor [B]; a part without rows is left out.

        Draws of rows are by prompt, draw and place, so that they do not depend on what is left out.

        Args:
            rows: rows of the generator
            stages: T

        Raises:
            ValueError: another number of weights than of stages.
        """
        factor = self._factors(stages, rows.sigma)[rows.stage]
        reached = rows.sigma_end < self.ceiling
        if self.stages is not None:
            reached = reached & (rows.stage < self.stages)
        for wanted in (True, False):
            index = (reached == wanted).nonzero().squeeze(1)
            if len(index):
                yield rows.select(index), wanted, factor[index]

    def among(self, sigmas: Tensor, stages: Sequence[int]) -> list[int]:
        """Choose from stages those that the reward reaches, before any is drawn.

        Args:
            sigmas: [T+1] noise grid
            stages: stages that may be drawn

        Raises:
            ValueError: another number of weights than of stages.
        """
        self._factors(len(sigmas) - 1, sigmas)
        return [stage for stage in stages if float(sigmas[stage + 1]) < self.ceiling and (self.stages is None or stage < self.stages)]

    def _factors(self, stages: int, like: Tensor) -> Tensor:
        if self.weights is None:
            return like.new_ones(stages)  # on the device: nothing is waited for
        if len(self.weights) != stages:
            raise ValueError(
                f"SurrogateReward.reward_weights must have a number for each of the {stages} stages; got {len(self.weights)}. Write as "
                "many, or leave it out if the run draws several numbers of steps."
            )
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device)


def weights_of_stages(given: Sequence[float] | None) -> tuple[float, ...] | None:
    """Weights as they are kept.

    Raises:
        ValueError: none, or one that is below 0 or not finite.
    """
    if given is None:
        return None
    if not given or not all(0 <= weight < math.inf for weight in given):
        raise ValueError(f"SurrogateReward.reward_weights must be a number of at least 0 for each stage; got {list(given)}")
    return tuple(given)


def is_least_sigma(objective: object, field: "attrs.Attribute[float]", value: float) -> None:
    """A validator: the least sigma that is asked for."""
    if not 0 <= value < 1:
        raise ValueError(f"SurrogateReward.{field.name} must lie in [0, 1): it is the least sigma asked for; got {value:g}")


def is_largest_sigma(objective: object, field: "attrs.Attribute[float]", value: float) -> None:
    """A validator: the largest sigma that is asked for."""
    if not 0 < value <= 1:
        raise ValueError(f"SurrogateReward.{field.name} must lie in (0, 1]: it is the largest sigma asked for; got {value:g}")
