"""Stage samplers: which of the student's K stages a step trains."""

from abc import ABC, abstractmethod
from collections.abc import Collection

import attrs
import numpy as np


class StageSampler(ABC):
    """Draws stages, equal on all processes."""

    @abstractmethod
    def draw(self, stages: int, generator: np.random.Generator) -> tuple[int, ...]:
        """Some of the stages 0 .. `stages` - 1; one may come twice."""

    def possible(self, stages: int) -> tuple[int, ...]:
        """Stages that some draw gives, so that an objective can refuse beforehand what does not fit them; () if that is not known."""
        return ()

    def expected(self, stages: int, among: Collection[int] | None = None, draws: int = 256) -> float:
        """Mean number of stages that a step trains, for forecasts: over some draws of a fixed seed.

        Args:
            stages: K
            among: stages that count; None counts all
            draws: draws whose mean it is
        """
        generator = np.random.default_rng(0)
        drawn = [stage for _ in range(draws) for stage in self.draw(stages, generator)]
        return sum(among is None or stage in among for stage in drawn) / draws


@attrs.frozen
class EveryStage(StageSampler):
    """All of them."""

    def draw(self, stages: int, generator: np.random.Generator) -> tuple[int, ...]:
        return tuple(range(stages))

    def possible(self, stages: int) -> tuple[int, ...]:
        return tuple(range(stages))


@attrs.frozen
class UniformStages(StageSampler):
    """Some stages without replacement.

    Args:
        count: number of stages; no more than there are
    """

    count: int = attrs.field(default=2, validator=attrs.validators.ge(1))

    def draw(self, stages: int, generator: np.random.Generator) -> tuple[int, ...]:
        return tuple(sorted(generator.choice(stages, size=min(self.count, stages), replace=False).tolist()))

    def possible(self, stages: int) -> tuple[int, ...]:
        return tuple(range(stages))


@attrs.frozen
class CleanerStages(StageSampler):
    """Independent draws with P(j) proportional to j + 1: ends with less noise come more often (the TDM-R1 release).

    Args:
        count: draws
    """

    count: int = attrs.field(default=2, validator=attrs.validators.ge(1))

    def draw(self, stages: int, generator: np.random.Generator) -> tuple[int, ...]:
        weights = np.arange(1, stages + 1)
        return tuple(sorted(generator.choice(stages, size=self.count, p=weights / weights.sum()).tolist()))

    def possible(self, stages: int) -> tuple[int, ...]:
        return tuple(range(stages))


@attrs.frozen
class FinalStage(StageSampler):
    """The last stage alone, each draw with taus and noises of its own.

    Its ends are clean, so the velocity of their noising, e - x_0, varies least: at an end of sigma s it is -x_s / (1 - s) + ..., whose
    variance at s = 0.9 and tau = 0.95 is more than forty times larger. A surrogate that is asked at high noise then has less of it in its
    gradient.

    Args:
        count: draws
    """

    count: int = attrs.field(default=2, validator=attrs.validators.ge(1))

    def draw(self, stages: int, generator: np.random.Generator) -> tuple[int, ...]:
        return (stages - 1,) * self.count

    def possible(self, stages: int) -> tuple[int, ...]:
        return (stages - 1,)
