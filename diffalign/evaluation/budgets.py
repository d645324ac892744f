"""Comparison of runs at equal cost: their held-out evaluations after equal steps, network rows and seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .intervals import Interval, bootstrap, paired_change
from .recorded import Entries, by_prompt, measures, read_lines, read_list

BUDGETS = ("steps", "rows", "seconds")


@attrs.frozen(eq=False)
class Recorded:
    """Evaluations and costs that a run has recorded.

    Args:
        name: name of the run
        evaluations: evaluations of held-out prompts, in order of steps
        costs: steps done -> steps, network rows and seconds spent in training by then, without evaluation
    """

    name: str
    evaluations: Entries
    costs: Mapping[int, Mapping[str, float]]

    @classmethod
    def of(cls, name: str, folder: Path, last: int | None = None) -> "Recorded":
        """Read `metrics.jsonl` and `evaluation.json` of a run folder.

        Args:
            name: name of the run
            folder: folder of the run
            last: number of steps after which nothing counts; None takes all
        """
        spent = dict.fromkeys(BUDGETS, 0.0)
        costs = {0: dict(spent)}
        for line in read_lines(folder / "metrics.jsonl"):
            if last is not None and line["step"] >= last:
                break
            spent["steps"] += 1
            spent["rows"] += sum(value for key, value in line.items() if key.startswith("rows/"))
            spent["seconds"] += sum(value for key, value in line.items() if key.startswith("seconds/"))
            costs[line["step"] + 1] = dict(spent)
        return cls(name, [entry for entry in read_list(folder / "evaluation.json") if entry["step"] in costs], costs)

    def spent(self) -> Mapping[str, float]:
        """Cost of the run up to its last evaluation."""
        return self.costs[self.evaluations[-1]["step"]] if self.evaluations else self.costs[0]

    def within(self, budget: str, limit: float) -> Mapping[str, Any]:
        """Last evaluation up to which the run cost at most `limit`."""
        return [entry for entry in self.evaluations if self.costs[entry["step"]][budget] <= limit * (1 + 1e-9)][-1]

    def settings(self) -> tuple[object, ...]:
        """Settings that must be equal in runs that are compared prompt by prompt."""
        entry = self.evaluations[-1]
        return tuple(entry[name] for name in ("samples", "steps", "seed")), tuple(row["prompt"] for row in entry["by_prompt"])


@attrs.frozen
class Standing:
    """Result of a run at a budget.

    Args:
        run: name of the run
        step: step of the evaluation
        cost: cost of the run up to that step, in the unit of the budget
        values: measure -> mean over prompts
        changes: measure -> paired difference to the first run; empty for the first
    """

    run: str
    step: int
    cost: float
    values: Mapping[str, Interval]
    changes: Mapping[str, Interval]


def at_equal_budgets(runs: Sequence[Recorded]) -> tuple[dict[str, list[Standing]], list[str]]:
    """Compare runs at equal budgets: each at its last evaluation within the total cost of the cheapest run.

    Only measures that all runs have are compared.

    Returns:
        Standings by budget, and a sentence for each run that was left out: it has no evaluation, or other prompts or noise than the first.
    """
    notes = [f"{run.name} has no held-out evaluation in its folder" for run in runs if not run.evaluations]
    usable = [run for run in runs if run.evaluations]
    alike = [run for run in usable if run.settings() == usable[0].settings()]
    notes += [f"{run.name} was evaluated on other prompts or noise than {usable[0].name}" for run in usable if run not in alike]
    if len(alike) < 2:
        return {}, notes
    shared = [entry for entry in measures(alike[0].evaluations[-1]) if all(entry in measures(run.evaluations[-1]) for run in alike)]
    table = {}
    for budget in BUDGETS:
        limit = min(run.spent()[budget] for run in alike)
        entries = [run.within(budget, limit) for run in alike]
        table[budget] = [
            Standing(
                run.name,
                entry["step"],
                run.costs[entry["step"]][budget],
                {label: bootstrap(by_prompt(entry, kind, name)) for label, kind, name in shared},
                {} if run is alike[0] else {label: _change(entries[0], entry, kind, name) for label, kind, name in shared},
            )
            for run, entry in zip(alike, entries, strict=True)
        ]
    return table, notes


def _change(first: Mapping[str, Any], entry: Mapping[str, Any], kind: str, name: str) -> Interval:
    return paired_change(by_prompt(first, kind, name), by_prompt(entry, kind, name))
