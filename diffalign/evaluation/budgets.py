"""Comparison of runs at equal cost: their held-out evaluations after equal steps, network rows and seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .intervals import Interval, bootstrap, paired_change
from .pairing import fewer, paired
from .recorded import Entries, basis, columns, comparable, read_lines, read_list

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

    def within(self, budget: str, limit: float) -> Mapping[str, Any] | None:
        """Last evaluation up to which the run cost at most `limit`; None without one.

        Only evaluations with the prompts and settings of the run's last one count.
        """
        known = [entry for entry in comparable(self.evaluations) if self.costs[entry["step"]][budget] <= limit * (1 + 1e-9)]
        return known[-1] if known else None

    def settings(self) -> tuple[object, ...]:
        """Prompts and settings of the last evaluation, which must be equal in runs that are compared prompt by prompt."""
        return basis(self.evaluations[-1])


@attrs.frozen
class Standing:
    """Result of a run at a budget.

    Args:
        run: name of the run
        step: step of the evaluation
        cost: cost of the run up to that step, in the unit of the budget
        values: measure -> mean over the prompts that have a number in all runs
        changes: measure -> paired difference to the first run of the table; empty for the first
        fewer: measure -> number of these prompts, of the measures where they are not all
    """

    run: str
    step: int
    cost: float
    values: Mapping[str, Interval]
    changes: Mapping[str, Interval]
    fewer: Mapping[str, int] = attrs.field(factory=dict)


def at_equal_budgets(runs: Sequence[Recorded]) -> tuple[dict[str, list[Standing]], list[str]]:
    """Compare runs at equal budgets: each at its last evaluation within the total cost of the cheapest run.

    Only measures that all runs have are compared, over the prompts that have a number in all of them.

    Returns:
        Standings by budget, and a sentence for each run that was left out: it has no evaluation, none within the cost of the cheapest run,
        or other prompts or noise than the first.
    """
    notes = [f"{run.name} has no held-out evaluation in its folder" for run in runs if not run.evaluations]
    usable = [run for run in runs if run.evaluations]
    alike = [run for run in usable if run.settings() == usable[0].settings()]
    notes += [f"{run.name} was evaluated on other prompts or noise than {usable[0].name}" for run in usable if run not in alike]
    if len(alike) < 2:
        return {}, notes
    table = {}
    for budget in BUDGETS:
        limit = min(run.spent()[budget] for run in alike)
        found = [(run, run.within(budget, limit)) for run in alike]
        known = [(run, entry) for run, entry in found if entry is not None]
        notes += [
            f"{run.name} has no evaluation on these prompts within the {budget} of the cheapest run"
            for run, entry in found
            if entry is None
        ]
        if len(known) > 1:
            table[budget] = _standings(budget, known)
    return table, notes


def _standings(budget: str, known: Sequence[tuple[Recorded, Mapping[str, Any]]]) -> list[Standing]:
    pairs = paired([columns(entry) for _, entry in known])
    few = fewer(pairs, len(known[0][1]["by_prompt"]))
    return [
        Standing(
            run.name,
            entry["step"],
            run.costs[entry["step"]][budget],
            {label: bootstrap(values[place]) for label, values in pairs.items()},
            {label: paired_change(values[0], values[place]) for label, values in pairs.items() if place > 0},
            few,
        )
        for place, (run, entry) in enumerate(known)
    ]
