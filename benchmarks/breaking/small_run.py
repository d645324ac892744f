"""The smallest run that writes everything a run can write: a Gaussian mixture, milliseconds a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.core import AlignmentLoop, Average, Hook, StandardizedSum
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler


def small_run(hooks: Sequence[Hook], folder: Path | None = None, **options: Any) -> AlignmentLoop:
    """The loop; the options are those of its objective."""
    modes = [[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]]
    return AlignmentLoop(
        SoftmaxTB(GaussianMixturePolicy(modes, 0.3), **options),
        TreeSampler(6, FixedPlan(splits=(1, 2))),
        lambda images, prompts: images[:, 0, 0, 0],
        Prompts(["left", "right", "up"]),
        StandardizedSum(),
        prompts_per_step=2,
        average=Average(0.9),
        folder=folder,
        hooks=list(hooks),
    )
