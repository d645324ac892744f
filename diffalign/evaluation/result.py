"""Result of an evaluation."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt

from .intervals import bootstrap


@attrs.frozen(eq=False)
class Evaluation:
    """Rewards, diversity and images of a policy for P prompts, with n samples of each. Equal seeds give equal noise.

    Args:
        step: training steps done
        prompts: P prompts
        rewards: rewards by name, each [P, n]; of a reward that does not apply to all prompts, the rows of those that it does
        diversity: diversity within the samples of a prompt, each [P]: l_gmd (of latents), ms_ssim_distance, and for each kind of features
            cosine/NAME, vendi/NAME, modes/NAME; larger is more diverse
        across: diversity over all prompts: cosine/NAME between samples of different prompts, vendi/NAME of all samples
        images: [p, n, 3, H, W] on the CPU, the first few prompts only
        settings: samples, steps and seed, which must be equal if two evaluations are compared prompt by prompt
        repeated: whether the run repeats this evaluation while it trains, so that its steps can be compared
        scored: reward name -> [P] bool, of a reward that does not apply to all prompts
    """

    step: int
    prompts: tuple[Prompt, ...]
    rewards: Mapping[str, Tensor]
    diversity: Mapping[str, Tensor]
    across: Mapping[str, float]
    images: Tensor
    settings: Mapping[str, int]
    repeated: bool = False
    scored: Mapping[str, Tensor] = attrs.field(factory=dict)

    @property
    def l_gmd(self) -> Tensor:
        """Log geometric mean distance of the latents of each prompt: [P]."""
        return self.diversity["l_gmd"]

    def measures(self) -> dict[str, Tensor]:
        """Collect rewards and diversity by prompt in one table, each [P]: reward NAME, diversity NAME.

        Where prompts come from several sources, reward NAME/SOURCE and diversity NAME/SOURCE as well, each over that source's prompts. A
        reward has as many numbers as there are prompts that it applies to.
        """
        rewards, diversity = self._by_name().values()
        return {**{f"reward {name}": values for name, values in rewards.items()}, **{f"diversity {n}": v for n, v in diversity.items()}}

    def _by_name(self) -> dict[str, dict[str, Tensor]]:
        """Collect the numbers by prompt of "rewards" and "diversity", over all prompts and of each source."""
        rewards = {name: values.mean(dim=1) for name, values in self.rewards.items()}
        table = {"rewards": dict(rewards), "diversity": dict(self.diversity)}
        for source in self._sources():
            theirs = torch.tensor([Prompt.of(prompt).source == source for prompt in self.prompts])
            for kind, whole in (("rewards", rewards), ("diversity", self.diversity)):
                for name, values in whole.items():
                    mine = theirs[self.scored[name]] if kind == "rewards" and name in self.scored else theirs
                    if bool(mine.any()):
                        table[kind][f"{name}/{source}"] = values[mine]
        return table

    def _sources(self) -> list[str]:
        """List the sources that the prompts name."""
        found = dict.fromkeys(Prompt.of(prompt).source for prompt in self.prompts)
        return [source for source in found if source is not None]

    def summary(self) -> dict[str, Any]:
        """Means over prompts and samples with 95 % intervals over prompts, and the values by prompt, as plain JSON."""
        by_name = self._by_name()
        intervals = {kind: {name: bootstrap(values) for name, values in table.items()} for kind, table in by_name.items()}
        return {
            "step": self.step,
            **self.settings,
            **{kind: {name: interval.mean for name, interval in table.items()} for kind, table in intervals.items()},
            "across": dict(self.across),
            "intervals": {kind: {name: interval.plain() for name, interval in table.items()} for kind, table in intervals.items()},
            "by_prompt": [self._of_prompt(row) for row in range(len(self.prompts))],
        }

    def _of_prompt(self, row: int) -> dict[str, Any]:
        """The numbers of one prompt, as plain JSON; without rewards that do not apply to it."""
        rewards: dict[str, float] = {}
        for name, values in self.rewards.items():
            known = self.scored.get(name)
            if known is None or bool(known[row]):
                rewards[name] = values[row if known is None else int(known[:row].sum())].mean().item()
        prompt = Prompt.of(self.prompts[row])
        numbers = {"rewards": rewards, "diversity": {name: values[row].item() for name, values in self.diversity.items()}}
        if prompt.source is None:
            return {"prompt": str(prompt), **numbers}
        by_source = {
            kind: {**table, **{f"{name}/{prompt.source}": value for name, value in table.items()}} for kind, table in numbers.items()
        }
        return {"prompt": str(prompt), "source": prompt.source, **by_source}

    def table(self) -> str:
        """Format the means with their intervals as text, one line each."""
        lines = [(name, str(bootstrap(values))) for name, values in self.measures().items()]
        lines += [(f"across prompts {name}", f"{value:.3f}") for name, value in self.across.items()]
        width = max(len(name) for name, _ in lines)
        head = f"{len(self.prompts)} prompts, {self.settings['samples']} samples each; mean [95 % interval over prompts]"
        return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in lines)])
