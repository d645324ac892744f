"""Conversion of split steps into a branching, shared by all plans."""

from collections.abc import Sequence

from diffalign.core.number_fields import is_finite, is_whole

from .plans import Branching


def branching_at(
    where: str,
    steps: int,
    splits: Sequence[int],
    etas: Sequence[float],
    branches: int,
    roots: int = 1,
    levels: int | None = None,
    max_leaves: int | None = None,
    promote_roots: bool = False,
) -> Branching:
    """Build the branching of a tree. It has roots * branches^levels leaves, wherever its splits are.

    Args:
        where: name of the plan in error messages
        steps: denoising steps T
        splits: stochastic steps, strictly increasing, inside [0, T - 1)
        etas: noise level of each split
        branches: children of a branching split
        roots: independent initial noises per prompt
        levels: number of splits that branch, the first ones; the other splits are stochastic with one child. None lets all branch
        max_leaves: largest number of leaves; the last levels do not branch if this is needed to stay below it
        promote_roots: replace a first split at step 0 or 1, where nearly all is noise, by `branches` times as many roots; the step becomes
            deterministic

    Raises:
        ValueError: there are more roots than `max_leaves` or more levels than splits, or a promotion leaves no stochastic step.
    """
    if levels is not None and levels > len(splits):
        raise ValueError(f"{where}.levels must be at most {len(splits)}, the number of splits; got {levels}")
    if max_leaves is not None and roots > max_leaves:
        raise ValueError(f"{where}.max_leaves must be at least the number of roots, {roots}; got {max_leaves}")
    branching = len(splits) if levels is None else levels
    while max_leaves is not None and roots * branches**branching > max_leaves:
        branching -= 1
    if promote_roots and branching and len(splits) == 1:
        raise ValueError(
            f"{where}.promote_roots needs a second split: the first one, at step 0 or 1, becomes roots, and no other step is stochastic"
        )
    if promote_roots and branching and splits[0] <= 1:
        roots, branching, splits, etas = roots * branches, branching - 1, splits[1:], etas[1:]
    children, noise_levels = [1] * steps, [0.0] * steps
    for index, (split, eta) in enumerate(zip(splits, etas, strict=True)):
        noise_levels[split] = eta
        if index < branching:
            children[split] = branches
    return Branching(tuple(children), tuple(noise_levels), roots)


def move_apart(where: str, positions: Sequence[float], first: int, last: int, gap: int) -> list[int]:
    """Round and sort positions; then move them to the right until they are `gap` apart, and back to the left if they pass `last`.

    Returns:
        One step in [first, last] for each position, at least `gap` apart.

    Raises:
        ValueError: that many steps do not fit.
    """
    if (len(positions) - 1) * gap > last - first:
        raise ValueError(
            f"{where}: {len(positions)} splits that are {gap} apart need {(len(positions) - 1) * gap + 1} steps, but only the steps "
            f"{first} to {last} may split. Take fewer splits, a smaller gap or tail guard, or more denoising steps."
        )
    steps = sorted(min(max(round(position), first), last) for position in positions)
    for index in range(1, len(steps)):
        steps[index] = max(steps[index], steps[index - 1] + gap)
    limit = last
    for index in reversed(range(len(steps))):
        steps[index] = min(steps[index], limit)
        limit = steps[index] - gap
    return steps


def noise_within(earliest: Branching, first: int, last: int, eta: float) -> tuple[float, ...]:
    """Largest eta of each step where splits are drawn anew, anywhere from step `first` to `last`: [T].

    Args:
        earliest: branching of the earliest splits that can be drawn; if its first one became roots, step `first` is never stochastic
        first: first step that may split
        last: last step that may split
        eta: largest noise level of a split
    """
    begin = first if earliest.noise_levels[first] > 0 else first + 1
    return tuple(eta if begin <= step <= last else 0.0 for step in range(len(earliest.noise_levels)))


def per_split(eta: float | Sequence[float], count: int, where: str) -> list[float]:
    """Noise level of each of `count` splits.

    Raises:
        ValueError: `eta` is a list of another length, or holds what is no finite number of at least 0.
    """
    etas = list(eta) if isinstance(eta, Sequence) and not isinstance(eta, str) else [eta] * count
    if len(etas) != count:
        raise ValueError(f"{where}.eta must be one number or {count}, one per split; got {len(etas)}")
    for level in etas:
        if not is_finite(level) or level < 0:
            raise ValueError(f"{where}.eta must be a finite number of at least 0, or {count} of them, one per split; got {eta!r}")
    return etas


def require_steps(where: str, steps: Sequence[int]) -> None:
    """Refuse what is no list of denoising steps.

    Args:
        where: name of the argument in the message
        steps: value that was given

    Raises:
        ValueError: it is none.
    """
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not all(map(is_whole, steps)):
        raise ValueError(f"{where} must be a list of whole numbers, denoising steps counted from 0; got {steps!r}")
