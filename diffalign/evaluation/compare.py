"""Comparison of policies on the same prompts and noise: differences, win rates, and the Pareto front of reward and diversity."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import attrs

from .intervals import Interval, bootstrap, paired_change, win_rate
from .result import Evaluation


@attrs.frozen(eq=False)
class Comparison:
    """Evaluations of several runs that differ only in the weights.

    Args:
        runs: evaluations by name of the run, at least 2; the others are compared with the first

    Raises:
        ValueError: there are fewer than two runs, or their prompts, noise, samples or measures differ.
    """

    runs: Mapping[str, Evaluation]

    def __attrs_post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"a comparison needs at least 2 runs; got {', '.join(self.runs) or 'none'}")
        first, *others = self.runs
        mine = self.runs[first]
        for name in others:
            other = self.runs[name]
            if mine.prompts != other.prompts or mine.settings != other.settings or mine.measures().keys() != other.measures().keys():
                raise ValueError(f"{first} and {name} must be evaluated on equal prompts, noise and rewards to be compared")

    def means(self) -> dict[str, dict[str, Interval]]:
        """Means over prompts: measure -> run -> mean."""
        table = {run: result.measures() for run, result in self.runs.items()}
        return {name: {run: bootstrap(table[run][name]) for run in self.runs} for name in next(iter(table.values()))}

    def differences(self) -> dict[str, dict[str, Interval]]:
        """Paired differences to the first run: measure -> other run -> difference."""
        first, *others = self.runs
        base = self.runs[first].measures()
        return {name: {run: paired_change(base[name], self.runs[run].measures()[name]) for run in others} for name in base}

    def win_rates(self) -> dict[str, dict[tuple[str, str], Interval]]:
        """Win rates: reward -> (run, other) -> share of images with a higher reward than the other run's, for the same prompt and noise."""
        rewards = next(iter(self.runs.values())).rewards
        return {
            name: {(a, b): win_rate(self.runs[a].rewards[name], self.runs[b].rewards[name]) for a, b in combinations(self.runs, 2)}
            for name in rewards
        }

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
            "front": {reward: {kind: self.front(reward, kind) for kind in first.diversity} for reward in first.rewards},
        }


def _beats(other: tuple[float, float], mine: tuple[float, float]) -> bool:
    return all(theirs >= own for theirs, own in zip(other, mine, strict=True)) and other != mine
