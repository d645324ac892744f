"""The generator's loss of TDM-R1: reward, guidance and closeness to the teacher, each as a direction of the clean prediction.

Legend: B rows, * latent dimensions.
"""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from diffalign.core import Condition, Loss, Policy, UpdateRows

from ..noising import diffuse, mean_over_dimensions
from .directions import Distance, GeneratorMix, Normalizer, pull
from .matching import Predictor
from .stages import Rows


@attrs.frozen(eq=False)
class Reinforcement:
    """The loss that moves the student.

    Args:
        student: trained
        teacher, fake, surrogate, baseline: predictions, without gradient
        mix, distance, normalizer: see `SurrogateReward`
    """

    student: Policy
    teacher: Predictor
    fake: Predictor
    surrogate: Predictor
    baseline: Predictor
    mix: GeneratorMix
    distance: Distance
    normalizer: Normalizer

    def evaluated(self, reached: int, others: int) -> UpdateRows:
        """Network rows of one update of the student.

        Args:
            reached: stages of a prompt's samples that the reward reaches
            others: those that it does not
        """
        return self._evaluated(reached, True) + self._evaluated(others, False)

    def _evaluated(self, rows: int, rewarded: bool) -> UpdateRows:
        weights, calls = self.mix.weights(rewarded), 0
        if weights["kl"] > 0 or (weights["guidance"] > 0 and self.teacher.guides):
            calls += self.teacher.calls
        calls += self.fake.calls * (weights["kl"] > 0)
        if rewarded and weights["reward"] > 0:
            calls += self.surrogate.calls + self.baseline.calls
        return UpdateRows((rows,), (rows,) * calls) if rows else UpdateRows()

    def directions(
        self,
        end: Tensor,
        rows: Rows,
        conditions: tuple[Condition, Condition],
        near: tuple[Tensor, Tensor],
        far: tuple[Tensor, Tensor] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Direction and aim by term, each [B, *]; a term that weighs nothing is left out.

        Args:
            end: [B, *] x_{j+1}
            rows: the B stages
            conditions: B rows, as the fake and as the teacher read them
            near: taus and noises of the terms "kl" and "guidance"
            far: those of the term "reward"; None for stages that it does not reach
        """
        weights = self.mix.weights(far is not None)
        (told, condition), direction, aim = conditions, {}, {}
        guided = weights["guidance"] > 0 and self.teacher.guides
        if weights["kl"] > 0 or guided:
            noised = diffuse(end, rows.sigma_end, *near)
            plain, aimed = self.teacher(noised, near[0], condition)
            if weights["kl"] > 0:
                direction["kl"], aim["kl"] = plain - self.fake(noised, near[0], told)[0], aimed
            if guided:
                direction["guidance"], aim["guidance"] = aimed - plain, aimed
        if far is not None and weights["reward"] > 0:
            noised = diffuse(end, rows.sigma_end, *far)
            aim["reward"] = self.surrogate(noised, far[0], condition)[1]
            direction["reward"] = aim["reward"] - self.baseline(noised, far[0], condition)[0]
        return direction, aim


def reinforce(
    roles: Reinforcement,
    rows: Rows,
    conditions: tuple[Condition, Condition, Condition],
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor] | None,
    factor: Tensor,
    groups: int,
    budget: int | None,
) -> Iterator[Loss]:
    """The sum over terms of weight distance(D) / w, averaged over samples of a group, drawn stages and groups.

    Args:
        roles: policies and settings that move the student
        rows: stages, replayed with a graph: such as the reward reaches, or such as it does not
        conditions: prompts as the student, as the fake and as the teacher read them
        near, far: taus [B] and noises [B, *] of the two branches; None where the reward does not reach
        factor: [B] of the term "reward"
        groups: global number of prompt groups
        budget: rows per micro-batch
    """
    weights = roles.mix.weights(far is not None)
    for piece in rows.pieces(budget):
        some = rows.select(piece)
        end, clean = some.replay(roles.student, conditions[0])
        with torch.no_grad():
            direction, aim = roles.directions(
                end,
                some,
                (conditions[1].select(some.prompt), conditions[2].select(some.prompt)),
                (near[0][piece], near[1][piece]),
                None if far is None else (far[0][piece], far[1][piece]),
            )
            divisor = roles.normalizer(clean, aim)
        value, metrics, count = clean.sum() * 0, {}, torch.tensor(len(piece))
        for term, towards in direction.items():
            per_row = weights[term] * pull(clean, towards, roles.distance) / divisor[term]
            if term == "reward":
                per_row = per_row * factor[piece]
            value = value + (per_row * some.share).sum() / groups
            metrics[f"generator/{term}"] = (mean_over_dimensions(towards.square()).sqrt().sum(), count)
        yield Loss(value, metrics)
