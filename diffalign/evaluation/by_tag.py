"""Means for each kind of prompt, as benchmarks report them."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from .intervals import Interval, bootstrap, mean_of_means
from .result import Evaluation

UNTAGGED = "untagged"
"""Prompts without a tag."""


@attrs.frozen
class ByTag:
    """The rewards of an evaluation for each tag of its prompts, and the mean over tags, each tag weighing the same.

    Args:
        counts: prompts of each tag
        tags: by reward, by tag; without tags of which the reward applies to no prompt
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
        tags = [str(prompt.metadata.get("tag") or UNTAGGED) for prompt in result.prompts]
        groups: dict[str, dict[str, Tensor]] = {}
        for name, values in result.rewards.items():
            theirs = [tags[place] for place in result.places(name).tolist()]
            rows = {tag: [row for row, other in enumerate(theirs) if other == tag] for tag in dict.fromkeys(tags)}
            groups[name] = {tag: values[some] for tag, some in rows.items() if some}
        return cls(
            {tag: tags.count(tag) for tag in dict.fromkeys(tags)},
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
        rows += [(tag, str(count), *(str(table.get(tag, "-")) for table in self.tags.values())) for tag, count in self.counts.items()]
        rows.append(("mean of tags", "", *map(str, self.overall.values())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
