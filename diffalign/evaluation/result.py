"""Result of an evaluation."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from diffalign.core import Prompt

from .intervals import bootstrap


@attrs.frozen(eq=False)
class Evaluation:
    """Rewards, diversity and images of a policy for P prompts, with n samples of each. Equal seeds give equal noise.

    Args:
        step: training steps done
        prompts: P prompts
        rewards: rewards by name, each [P, n]
        diversity: diversity within the samples of a prompt, each [P]: l_gmd (of latents), ms_ssim_distance, and for each kind of features
            cosine/NAME, vendi/NAME, modes/NAME; larger is more diverse
        across: diversity over all prompts: cosine/NAME between samples of different prompts, vendi/NAME of all samples
        images: [p, n, 3, H, W] on the CPU, the first few prompts only
        settings: samples, steps and seed, which must be equal if two evaluations are compared prompt by prompt
        repeated: whether the run repeats this evaluation while it trains, so that its steps can be compared
    """

    step: int
    prompts: tuple[Prompt, ...]
    rewards: Mapping[str, Tensor]
    diversity: Mapping[str, Tensor]
    across: Mapping[str, float]
    images: Tensor
    settings: Mapping[str, int]
    repeated: bool = False

    @property
    def l_gmd(self) -> Tensor:
        """Log geometric mean distance of the latents of each prompt: [P]."""
        return self.diversity["l_gmd"]

    def measures(self) -> dict[str, Tensor]:
        """Collect rewards and diversity by prompt in one table, each [P]: reward NAME, diversity NAME."""
        rewards = {f"reward {name}": values.mean(dim=1) for name, values in self.rewards.items()}
        return {**rewards, **{f"diversity {name}": values for name, values in self.diversity.items()}}

    def summary(self) -> dict[str, Any]:
        """Means over prompts and samples with 95 % intervals over prompts, and the values by prompt, as plain JSON."""
        by_name = {"rewards": {name: values.mean(dim=1) for name, values in self.rewards.items()}, "diversity": self.diversity}
        intervals = {kind: {name: bootstrap(values) for name, values in table.items()} for kind, table in by_name.items()}
        return {
            "step": self.step,
            **self.settings,
            **{kind: {name: interval.mean for name, interval in table.items()} for kind, table in intervals.items()},
            "across": dict(self.across),
            "intervals": {kind: {name: interval.plain() for name, interval in table.items()} for kind, table in intervals.items()},
            "by_prompt": [
                {
                    "prompt": str(prompt),
                    **{kind: {name: values[row].item() for name, values in table.items()} for kind, table in by_name.items()},
                }
                for row, prompt in enumerate(self.prompts)
            ],
        }

    def table(self) -> str:
        """Format the means with their intervals as text, one line each."""
        lines = [(name, str(bootstrap(values))) for name, values in self.measures().items()]
        lines += [(f"across prompts {name}", f"{value:.3f}") for name, value in self.across.items()]
        width = max(len(name) for name, _ in lines)
        head = f"{len(self.prompts)} prompts, {self.settings['samples']} samples each; mean [95 % interval over prompts]"
        return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in lines)])
