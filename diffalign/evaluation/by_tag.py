"""Means for each kind of prompt, as benchmarks report them."""

from collections.abc import Mapping
from typing import Any

import attrs

from .intervals import Interval, bootstrap, mean_of_means
from .result import Evaluation

UNTAGGED = "untagged"
"""Prompts without a tag."""


@attrs.frozen
class ByTag:
    """The rewards of an evaluation for each tag of its prompts, and the mean over tags, each tag weighing the same.

    Args:
        counts: prompts of each tag
        tags: by reward, by tag
        overall: by reward, the mean of the tags' means
    """

    counts: Mapping[str, int]
    tags: Mapping[str, Mapping[str, Interval]]
    overall: Mapping[str, Interval]

    @classmethod
    def of(cls, result: Evaluation) -> "ByTag":
        """Tags are the metadata "tag" of the prompts, in the order in which they come first.

        Args:
            result: result of an evaluation
        """
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(result.prompts):
            places.setdefault(str(prompt.metadata.get("tag") or UNTAGGED), []).append(place)
        groups = {name: {tag: values[rows] for tag, rows in places.items()} for name, values in result.rewards.items()}
        return cls(
            {tag: len(rows) for tag, rows in places.items()},
            {name: {tag: bootstrap(values) for tag, values in table.items()} for name, table in groups.items()},
            {name: mean_of_means([*table.values()]) for name, table in groups.items()},
        )

    def plain(self) -> dict[str, Any]:
        """Return the table as plain values for JSON."""
        return {
            "prompts": dict(self.counts),
            "tags": {name: {tag: interval.plain() for tag, interval in table.items()} for name, table in self.tags.items()},
            "mean of tags": {name: interval.plain() for name, interval in self.overall.items()},
        }

    def table(self) -> str:
        """Format the table as text: a row for each tag, a column for each reward."""
        rows = [("tag", "prompts", *self.tags)]
        rows += [(tag, str(count), *(str(table[tag]) for table in self.tags.values())) for tag, count in self.counts.items()]
        rows.append(("mean of tags", "", *map(str, self.overall.values())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
