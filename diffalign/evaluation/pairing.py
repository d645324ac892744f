"""Pairing of evaluations prompt by prompt: only numbers about the same prompts are compared.

Legend: P prompts, K of them that have a number.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Column:
    """Numbers of one measure, and the prompts that they are about.

    Args:
        places: places of the prompts that have a number: [K] int64, ascending, on the CPU
        values: their numbers, [K] or [K, n]
    """

    places: Tensor
    values: Tensor


def paired(tables: Sequence[Mapping[str, Column]]) -> dict[str, tuple[Tensor, ...]]:
    """Pair the measures of evaluations of equal prompts and noise, over the prompts that have a number in every evaluation.

    Args:
        tables: measure -> column, of each evaluation

    Returns:
        Measure -> its numbers in each evaluation, each [K] or [K, n]. A measure that no prompt has in every evaluation is left out.
    """
    found = {}
    for name in tables[0]:
        if all(name in table for table in tables):
            columns = [table[name] for table in tables]
            shared = reduce(lambda places, column: places[torch.isin(places, column.places)], columns, columns[0].places)
            if len(shared):
                found[name] = tuple(column.values[torch.isin(column.places, shared)] for column in columns)
    return found


def fewer(pairs: Mapping[str, Sequence[Tensor]], prompts: int) -> dict[str, int]:
    """Measure -> number of paired prompts, of the measures where it is below the number of evaluated prompts."""
    return {name: len(values[0]) for name, values in pairs.items() if len(values[0]) < prompts}


def over(name: str, few: Mapping[str, int]) -> str:
    """Text after the name of a measure: the number of its paired prompts where these are not all, as `fewer` gives it; else nothing."""
    return f" (over {few[name]} prompt{'s' * (few[name] > 1)})" if name in few else ""
