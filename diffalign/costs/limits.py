"""Lower bound of the time of a run's step on a card that need not be in this machine."""

import functools
from collections.abc import Callable, Iterator, Sequence

from ..core import AlignmentLoop
from ..core.budget import rows_of
from ..core.guided import evaluations
from ..samplers import Branching
from .cards import Card
from .expected import Manner
from .kept import Kept
from .roofline import Bound, Work, bounds, expected, pieces
from .rows import Counted
from .sizes import figures
from .updates import calls_of, step_rows


def work_of(loop: AlignmentLoop, tree: Branching, update: int, devices: int = 1, more: int = 0) -> Work:
    """List the network calls of a step on one device. An update has those of `Objective.step_rows`, or replay, reference and old weights.

    Args:
        loop: the built loop
        tree: tree of its sampler
        update: rows of an update for one prompt
        devices: number of devices that share the prompts
        more: prompt groups that the device takes beside those of the run
    """
    groups = -(-loop.prompts_per_step // devices) + more
    size = min(loop.rollout.prompts or groups, groups)
    sizes = [min(size, groups - start) for start in range(0, groups, size)]
    calls = [rows for count in sizes for width in tree.evaluated for rows in pieces(width * count, rows_of(loop.sampler))]
    once, graphs = pieces(update * groups, rows_of(loop.objective)), Kept.of(loop, tree, update)
    noisy = [width for width, eta in zip(tree.widths, tree.noise_levels, strict=False) if eta > 0 and graphs.spares]
    kept = [rows for count in sizes for width in noisy for rows in pieces(width * count, rows_of(loop.sampler))]
    before = graphs.spares > 0 and graphs.updates > 1  # the log-probabilities that later updates compare with
    beside, each = before + sum(name in loop.policies() for name in ("reference", "old")), evaluations(loop.objective.policy)
    updates, frozen = once * graphs.evaluated * each, once * beside * each
    if (every := step_rows(loop)) is not None:
        updates, frozen = calls_of(every, groups, rows_of(loop.objective))
    numbers = sum(parameter.numel() for policy in loop.trained().values() for parameter in policy.trainable_parameters().values())
    return Work(
        tuple(calls) * evaluations(loop.objective.behavior()),
        updates,
        frozen,
        numbers * graphs.updates,
        tuple(kept) * evaluations(loop.objective.policy),
    )


def limits(
    loop: AlignmentLoop, tree: Branching, update: int, card: Card, counted: Sequence[tuple[float, Counted]], devices: int = 1
) -> Iterator[tuple[str, str]]:
    """Make the lines of a table: expected time, the bound, the bound if operators are fused, the operators, and one more prompt group.

    Args:
        loop: the built loop
        tree: tree of its sampler
        update: rows of an update for one prompt
        card: data sheet of a device
        counted: calls of the policy at each image size, with its share of the steps; the lines are of a mean step
        devices: number of devices that share the prompts
    """
    policy, work = loop.objective.policy, work_of(loop, tree, update, devices)
    peak = card.peak(counted[0][1].policy.precision)  # not that of this device, on which mixed precision may be slower than float32
    manner, shares = Manner.of(policy), [share for share, _ in counted]

    def mean(stages: Callable[[Counted], tuple[Bound, Bound]]) -> tuple[Bound, Bound]:
        rollouts, updates = zip(*(stages(calls) for _, calls in counted), strict=True)
        return _mean(rollouts, shares), _mean(updates, shares)

    rollout, update_expected = mean(functools.partial(expected, work=work, card=card, manner=manner))
    step = rollout.seconds + update_expected.seconds
    yield (
        f"expected on {card.name}",
        (
            f"{figures(step)} s a step ({3600 / step:,.0f} an hour): rollout {figures(rollout.seconds)} s ({rollout.share(peak):.0%} of "
            f"{peak / 1e12:.4g} TFLOP/s), update {figures(update_expected.seconds)} s ({update_expected.share(peak):.0%}); "
            f"{'not compiled' if manner.several.rest == 1 else 'compiled'}, no decoding, no rewards"
        ),
    )
    for name, fused in ((f"least on {card.name}", False), ("fused", True)):
        rollout, update_bound = mean(functools.partial(bounds, work=work, card=card, fused=fused))
        seconds = rollout.seconds + update_bound.seconds
        yield (
            name,
            (
                f"{figures(seconds)} s a step ({3600 / seconds:,.0f} an hour): rollout {figures(rollout.seconds)} s "
                f"({rollout.share(peak):.0%} of "
                f"{peak / 1e12:.4g} TFLOP/s), update {figures(update_bound.seconds)} s ({update_bound.share(peak):.0%})"
                f"{', if all that is no product were fused with a neighbour' if fused else ', operator by operator'}"
            ),
        )
    operators = rollout.operators + update_bound.operators
    more = work_of(loop, tree, update, devices, more=1)
    larger = sum(bound.seconds for bound in mean(functools.partial(expected, work=more, card=card, manner=manner)))
    groups = -(-loop.prompts_per_step // devices)
    every = step_rows(loop)
    evaluated = (update if Kept.of(loop, tree, update).evaluated else 0) if every is None else sum(every.trained)
    rolled, trained = evaluations(loop.objective.behavior()) * tree.rollout_rows, evaluations(policy) * evaluated
    yield (
        "one more prompt",
        (
            f"on each device: {rolled} network rows of rollout and {trained} of update more, {figures(larger - step)} s: "
            f"{larger / step - 1:.0%} of a step for {1 / groups:.0%} more samples"
        ),
    )
    yield "operators", f"{operators:,} a step; where starting one takes 10 microseconds, the host needs {figures(operators * 1e-5)} s"


def _mean(parts: Sequence[Bound], shares: Sequence[float]) -> Bound:
    seconds = sum(share * part.seconds for share, part in zip(shares, parts, strict=True))
    useful = sum(share * part.useful for share, part in zip(shares, parts, strict=True))
    operators = sum(share * part.operators for share, part in zip(shares, parts, strict=True))
    return Bound(seconds, useful, round(operators))
