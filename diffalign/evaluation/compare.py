"""Comparison of policies on the same prompts and noise: differences, win rates, and the Pareto front of reward and diversity."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import attrs
from torch import Tensor

from .intervals import Interval, bootstrap, paired_change, win_rate
from .pairing import Column, fewer, paired
from .result import Evaluation


@attrs.frozen(eq=False)
class Comparison:
    """Evaluations of several runs that differ only in the weights.

    Every number is over the prompts that have one in all runs: a reward may apply to some pictures of one run only.

    Args:
        runs: evaluations by name of the run, at least 2; the others are compared with the first

    Raises:
        ValueError: there are fewer than two runs, or their prompts, noise, samples or measures of diversity differ.
    """

    runs: Mapping[str, Evaluation]

    def __attrs_post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"a comparison needs at least 2 runs; got {', '.join(self.runs) or 'none'}")
        first, *others = self.runs
        mine = self.runs[first]
        for name in others:
            other = self.runs[name]
            if mine.prompts != other.prompts or mine.settings != other.settings or mine.diversity.keys() != other.diversity.keys():
                raise ValueError(f"{first} and {name} must be evaluated on equal prompts, noise and features to be compared")

    def fewer(self) -> dict[str, int]:
        """Measure -> number of prompts that it is over, of the measures that not all prompts have in all runs."""
        first = next(iter(self.runs.values()))
        return fewer({name: [*runs.values()] for name, runs in self._numbers().items()}, len(first.prompts))

    def notes(self) -> list[str]:
        """Say in sentences which rewards are not compared."""
        rewards = dict.fromkeys(name for result in self.runs.values() for name in result.rewards)
        if not rewards:
            return ["No reward scored a picture: only diversity is compared."]
        known, won = self.rewards(), self._scored_in_both()
        notes = [f"No prompt was scored by the reward {name} in all runs: it is not compared." for name in rewards if name not in known]
        return notes + [f"The reward {name} scored no image of two runs in both: it has no win rate." for name in known if name not in won]

    def means(self) -> dict[str, dict[str, Interval]]:
        """Means over prompts: measure -> run -> mean."""
        return {name: {run: bootstrap(values) for run, values in runs.items()} for name, runs in self._numbers().items()}

    def differences(self) -> dict[str, dict[str, Interval]]:
        """Paired differences to the first run: measure -> other run -> difference."""
        first, *others = self.runs
        return {name: {run: paired_change(runs[first], runs[run]) for run in others} for name, runs in self._numbers().items()}

    def win_rates(self) -> dict[str, dict[tuple[str, str], Interval]]:
        """Win rates: reward -> (run, other) -> share of images with a higher reward than the other run's, for the same prompt and noise.

        An image counts where the reward has a score for it in both runs. A reward of which two runs share no such image is left out.
        """
        rewards = self.rewards()
        return {
            name: {(a, b): win_rate(rewards[name][a], rewards[name][b], counts=both) for (a, b), both in pairs.items()}
            for name, pairs in self._scored_in_both().items()
        }

    def _scored_in_both(self) -> dict[str, dict[tuple[str, str], Tensor]]:
        """Pair the images that have a score: reward -> (run, other) -> [K, n] bool; without rewards for which two runs share none."""
        runs = self.runs.values()
        masks = self._by_run(paired([{name: Column(run.places(name), run.samples_scored(name)) for name in run.rewards} for run in runs]))
        found = {name: {(a, b): of[a] & of[b] for a, b in combinations(self.runs, 2)} for name, of in masks.items()}
        return {name: pairs for name, pairs in found.items() if all(bool(both.any()) for both in pairs.values())}

    def rewards(self) -> dict[str, dict[str, Tensor]]:
        """Pair the rewards of the images: reward -> run -> [K, n]."""
        runs = self.runs.values()
        return self._by_run(paired([{name: Column(run.places(name), values) for name, values in run.rewards.items()} for run in runs]))

    def _numbers(self) -> dict[str, dict[str, Tensor]]:
        """Pair the measures: measure -> run -> numbers of the prompts that have one in all runs, each [K]."""
        return self._by_run(paired([result.columns() for result in self.runs.values()]))

    def _by_run(self, pairs: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {name: dict(zip(self.runs, values, strict=True)) for name, values in pairs.items()}

    def front(self, reward: str, diversity: str = "l_gmd") -> list[str]:
        """Runs on the Pareto front: no other run is at least as good in mean reward and mean diversity and better in one of them."""
        means = self.means()
        place = {run: (means[f"reward {reward}"][run].mean, means[f"diversity {diversity}"][run].mean) for run in self.runs}
        return [run for run, mine in place.items() if not any(_beats(other, mine) for other in place.values())]

    def plain(self) -> dict[str, Any]:
        """Convert the comparison to plain JSON values."""
        first = next(iter(self.runs.values()))
        return {
            "prompts": [str(prompt) for prompt in first.prompts],
            **first.settings,
            "runs": {name: result.summary() for name, result in self.runs.items()},
            "difference_to": next(iter(self.runs)),
            "differences": {name: {run: each.plain() for run, each in runs.items()} for name, runs in self.differences().items()},
            "win_rates": {
                name: [{"run": a, "against": b, **each.plain()} for (a, b), each in pairs.items()]
                for name, pairs in self.win_rates().items()
            },
            "front": {reward: {kind: self.front(reward, kind) for kind in first.diversity} for reward in self.rewards()},
            "paired_prompts": self.fewer(),
            "not_compared": self.notes(),
        }


def _beats(other: tuple[float, float], mine: tuple[float, float]) -> bool:
    return all(theirs >= own for theirs, own in zip(other, mine, strict=True)) and other != mine
