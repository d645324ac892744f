"""Sigma grids of a few-step student: one for each number of steps that it serves."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from diffalign.core import Policy

from .diffusers import Family

MOST_STEPS = 8

Grid = Callable[[int], Tensor] | Sequence[float | Sequence[float]]
"""Grid: a function of the number of steps, the sigmas of one number of steps, or a list of sigmas for each number."""


def require_free_grid(family: Family) -> None:
    """Refuse a grid for a family that has only its own.

    Raises:
        ValueError: the family's network knows only the levels of its training.
    """
    if not family.free_grid:
        raise ValueError(f"grid must be left out for a {type(family).__name__}: its network knows only the levels of its training")


def grids_of(policy: Policy, steps: int, also: Sequence[int], grid: Grid | None, family: Family | None = None) -> dict[int, Tensor]:
    """Build the grids: number of steps -> sigmas [steps + 1].

    Args:
        policy: policy whose own grids are the default
        steps: the main number of steps; first in the result
        also: the other numbers of steps
        grid: the given grids; None takes those of the policy
        family: family of the policy's network; None if it has none

    Raises:
        ValueError: a number is outside 1..8 or appears twice, the grids do not fit the numbers, or the family has other grids alone.
    """
    if not _allowed(steps):
        raise ValueError(f"TDMPolicy.steps must lie between 1 and {MOST_STEPS}; got {steps}")
    counts = (steps, *also)
    if not all(map(_allowed, also)) or len(set(counts)) < len(counts):
        raise ValueError(
            f"TDMPolicy.also must hold numbers of steps from 1 to {MOST_STEPS}, each once, none of them steps = {steps}; got {list(also)}"
        )
    grids = {count: _levels(policy, count, counts, grid) for count in counts}
    for count, levels in grids.items():
        if family is not None and not family.free_grid:  # its own may end above 0
            if not torch.equal(levels, policy.sigmas(count)):  # forks and saved students give the own one
                require_free_grid(family)
            continue
        if levels.shape != (count + 1,) or not bool((levels.diff() < 0).all()) or float(levels[-1]) != 0 or float(levels[0]) > 1:
            raise ValueError(f"TDMPolicy.grid must give {count + 1} sigmas from at most 1 decreasing to 0; got {levels.tolist()}")
    return grids


def listed(counts: Sequence[int]) -> str:
    """Join numbers to a text such as "1, 2 and 4"."""
    *first, last = map(str, counts)
    return f"{', '.join(first)} and {last}" if first else last


def _allowed(steps: int) -> bool:
    return type(steps) is int and 1 <= steps <= MOST_STEPS


def _levels(policy: Policy, count: int, counts: Sequence[int], grid: Grid | None) -> Tensor:
    if grid is None:
        return policy.sigmas(count)
    if callable(grid):
        return grid(count)
    if not any(isinstance(entry, Sequence) for entry in grid):
        if len(counts) > 1:
            raise ValueError(
                f"TDMPolicy.grid must be a function, or a list of lists of sigmas, one for each of {listed(counts)} steps; one list cannot "
                f"serve them all. Got {list(grid)}"
            )
        return torch.tensor(list(grid), dtype=torch.float32)
    lengths = [len(entry) if isinstance(entry, Sequence) else 0 for entry in grid]
    if sorted(lengths) != sorted(known + 1 for known in counts):
        raise ValueError(
            f"TDMPolicy.grid must have one list of K + 1 sigmas for each of {listed(counts)} steps; got lists of {listed(lengths)} sigmas"
        )
    return torch.tensor(list(cast(Sequence[float], grid[lengths.index(count + 1)])), dtype=torch.float32)
