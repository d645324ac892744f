"""Result of an evaluation."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt

from .intervals import bootstrap
from .pairing import Column, fewer, over


def _shape(values: Tensor) -> str:
    return str(list(values.shape))


def _shapes(table: Mapping[str, Tensor]) -> str:
    return "{" + ", ".join(f"{name!r}: {_shape(values)}" for name, values in table.items()) + "}"


@attrs.frozen(eq=False)
class Evaluation:
    """Rewards, diversity and images of a policy for P prompts, with n samples of each. Equal seeds give equal noise.

    Printed, it is its `table`.

    Args:
        step: training steps done
        prompts: P prompts
        rewards: rewards by name, each [P, n]; of a reward that does not apply to all prompts, the rows of those that it does
        diversity: diversity within the samples of a prompt, each [P]: l_gmd (of latents), ms_ssim_distance, and for each kind of features
            cosine/NAME, vendi/NAME, modes/NAME; larger is more diverse
        across: diversity over all prompts: cosine/NAME between samples of different prompts, where there are several, vendi/NAME of all
            samples
        images: [p, n, 3, H, W] on the CPU, the first few prompts only
        settings: samples, steps and seed, which must be equal if two evaluations are compared prompt by prompt
        repeated: whether the run repeats this evaluation while it trains, so that its steps can be compared
        scored: reward name -> [P] bool, of a reward that does not apply to all prompts
        applies: reward name -> [K, n] bool in the rows of `rewards`, of a reward that has no score for some samples of its K prompts; there
            `rewards` has the mean of the others
    """

    step: int
    prompts: tuple[Prompt, ...] = attrs.field(repr=False)
    rewards: Mapping[str, Tensor] = attrs.field(repr=_shapes)
    diversity: Mapping[str, Tensor] = attrs.field(repr=_shapes)
    across: Mapping[str, float]
    images: Tensor = attrs.field(repr=_shape)
    settings: Mapping[str, int]
    repeated: bool = False
    scored: Mapping[str, Tensor] = attrs.field(factory=dict, repr=_shapes)
    applies: Mapping[str, Tensor] = attrs.field(factory=dict, repr=_shapes)

    def __str__(self) -> str:
        return self.table()

    @property
    def l_gmd(self) -> Tensor:
        """Log geometric mean distance of the latents of each prompt: [P]."""
        return self.diversity["l_gmd"]

    def measures(self) -> dict[str, Tensor]:
        """Collect rewards and diversity by prompt in one table, each [P]: reward NAME, diversity NAME.

        Where prompts come from several sources, reward NAME/SOURCE and diversity NAME/SOURCE as well, each over that source's prompts. A
        reward has as many numbers as there are prompts that it applies to.
        """
        return {name: column.values for name, column in self.columns().items()}

    def columns(self) -> dict[str, Column]:
        """Collect `measures` with the places of their prompts, to be paired with those of another evaluation of the same prompts."""
        return {f"{kind.removesuffix('s')} {name}": column for kind, table in self._by_name().items() for name, column in table.items()}

    def places(self, reward: str) -> Tensor:
        """Places of the prompts that a reward applies to, in the order of its rows: [K]."""
        every = torch.arange(len(self.prompts))
        return every[self.scored[reward].cpu()] if reward in self.scored else every

    def samples_scored(self, reward: str) -> Tensor:
        """Say which samples have a score of their own, in the rows of the reward: [K, n] bool."""
        return self.applies[reward] if reward in self.applies else torch.ones_like(self.rewards[reward], dtype=torch.bool)

    def _by_name(self) -> dict[str, dict[str, Column]]:
        """Collect the numbers by prompt of "rewards" and "diversity", over all prompts and of each source."""
        rewards = {name: Column(self.places(name), values.mean(dim=1)) for name, values in self.rewards.items()}
        diversity = {name: Column(torch.arange(len(self.prompts)), values) for name, values in self.diversity.items()}
        table = {"rewards": dict(rewards), "diversity": dict(diversity)}
        for source in self._sources():
            theirs = torch.tensor([Prompt.of(prompt).source == source for prompt in self.prompts])
            for kind, whole in (("rewards", rewards), ("diversity", diversity)):
                for name, column in whole.items():
                    mine = theirs[column.places]
                    if bool(mine.any()):
                        table[kind][f"{name}/{source}"] = Column(column.places[mine], column.values[mine])
        return table

    def _sources(self) -> list[str]:
        """List the sources that the prompts name."""
        found = dict.fromkeys(Prompt.of(prompt).source for prompt in self.prompts)
        return [source for source in found if source is not None]

    def summary(self) -> dict[str, Any]:
        """Means over prompts and samples with 95 % intervals over prompts, and the values by prompt, as plain JSON."""
        by_name = self._by_name()
        intervals = {kind: {name: bootstrap(column.values) for name, column in table.items()} for kind, table in by_name.items()}
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
            mine = values[self.places(name) == row]
            if len(mine):
                rewards[name] = mine[0].mean().item()
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
        measures = self.measures()
        few = fewer({name: [values] for name, values in measures.items()}, len(self.prompts))
        lines = [(name + over(name, few), str(bootstrap(values))) for name, values in measures.items()]
        lines += [(f"across prompts {name}", f"{value:.3f}") for name, value in self.across.items()]
        width = max(len(name) for name, _ in lines)
        head = f"{len(self.prompts)} prompts, {self.settings['samples']} samples each; mean [95 % interval over prompts]"
        return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in lines)])
