"""Several policies on the same prompts and noise: differences, win rates, and the front of reward and diversity."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import attrs

from .intervals import Interval, bootstrap, paired_change, win_rate
from .result import Evaluation


@attrs.frozen(eq=False)
class Comparison:
    """Evaluations of several runs, which differ in the weights alone.

    Args:
        runs: by name, at least 2; the first is what the others are compared with

    Raises:
        ValueError: fewer than two runs, or prompts, noise, samples or measures that differ.
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
        """Measure -> run -> mean over prompts."""
        table = {run: result.measures() for run, result in self.runs.items()}
        return {name: {run: bootstrap(table[run][name]) for run in self.runs} for name in next(iter(table.values()))}

    def differences(self) -> dict[str, dict[str, Interval]]:
        """Measure -> every run but the first -> its paired difference to the first."""
        first, *others = self.runs
        base = self.runs[first].measures()
        return {name: {run: paired_change(base[name], self.runs[run].measures()[name]) for run in others} for name in base}

    def win_rates(self) -> dict[str, dict[tuple[str, str], Interval]]:
        """Reward -> (run, other) -> how often the run's image has more of it than the other's, for the same prompt and noise."""
        rewards = next(iter(self.runs.values())).rewards
        return {
            name: {(a, b): win_rate(self.runs[a].rewards[name], self.runs[b].rewards[name]) for a, b in combinations(self.runs, 2)}
            for name in rewards
        }

    def front(self, reward: str, diversity: str = "l_gmd") -> list[str]:
        """The runs that no other run beats in both: mean reward and mean diversity, at least one of them strictly."""
        means = self.means()
        place = {run: (means[f"reward {reward}"][run].mean, means[f"diversity {diversity}"][run].mean) for run in self.runs}
        return [run for run, mine in place.items() if not any(_beats(other, mine) for other in place.values())]

    def plain(self) -> dict[str, Any]:
        """Everything as JSON."""
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
