"""First-step contract: before the first update, a replay must reproduce the rollout.

Rounding does not break the contract. A network rounds differently when the number of rows changes. In bfloat16 the difference can be some
per cent of the velocity, and where a step has little noise, this is more than the noise itself. So the check repeats whole calls of the
rollout, with the same rows: if the policy is still the same function, it gives the same bits in every floating type. Some calls cannot be
repeated like this: the sampler does not number its calls, the network is compiled, or only a part of the call fits the row limit. For
these, the deviation is compared with how much the policy deviates from itself.
"""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn

from .diagnosis import Call, Suspicion, cause_of
from .errors import ContractError
from .policy import Policy
from .replay import Edges, replay_parents
from .transition import Gaussian
from .types import UNRECORDED, TrajectoryBatch

SAME = 1e-5
"""Largest deviation that is accepted without a further check, for a call that was repeated with the same rows."""

_MARGIN = 4.0
"""Factor over the measured rounding error: a deviation up to this multiple of it counts as rounding."""

_PART = 4
"""Number of rows that are checked of a call that cannot be repeated as a whole."""

ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Largest rounding error of a velocity when only the batch shape changes, by the type in which the network computes.
Above it, the rows of a batch influence each other, or the network computes in another type than its weights have. The value for float32
allows for TF32 in convolutions."""

_SETTLED, _EVERY = 5, 5
"""Step from which on the contract is checked at every fifth step only. By then what recordings, forks and moved weights can break has
shown, and one call a step is 2 to 9 per cent of a step of a small network on a GPU."""

_REPEATED = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest rounding error between two equal calls, which may differ only by the order of additions: 1e-2 in half precision."""


@attrs.frozen
class FirstStep:
    """Result of comparing a replay with its rollout.

    Args:
        deviation: largest ||mean - rollout mean|| / ||velocity's part of the step|| over the edges that were checked; 0.01 means a
            velocity that is wrong by one per cent. None if no edge was checked
        rounding: largest change of the log-probability of a path when the batch shape changes, in the unit of the kernel's log-density.
            It is estimated from the edges of one row; None after the first step
        rows: network rows that were spent
    """

    deviation: float | None = None
    rounding: float | None = None
    rows: int = 0

    def metrics(self) -> dict[str, float]:
        """Name what was measured; a number that was not has no name here."""
        numbers = {"contract/deviation": self.deviation, "contract/rounding": self.rounding}
        return {name: number for name, number in numbers.items() if number is not None}


def due(step: int) -> bool:
    """Say whether a run makes its dearer checks at a step, of the contract and of rewards: at the first five and at every fifth."""
    return step < _SETTLED or step % _EVERY == 0


@torch.no_grad()
def check_first_step(
    policy: Policy,
    trajectories: TrajectoryBatch,
    step: int = 0,
    rows: int | None = None,
    precision: torch.dtype | None = None,
) -> FirstStep:
    """Repeat network calls of a rollout and compare the means.

    Args:
        policy: the policy that rolled out, with the same weights
        trajectories: its forest
        step: number of the step, from 0. Step 0 repeats all calls with stochastic edges; every later one repeats one of them, so that at
            the steps that are `due` all have their turn
        rows: network rows to spend at most (step 0 spends one or two more to measure rounding). Of a call with more rows only a part is
            repeated; in half precision this finds only large faults. None repeats whole calls
        precision: type in which the policy computed during the rollout; None takes its present type

    Returns:
        The largest deviation; no deviation where the forest has no stochastic edge, because nothing was checked.

    Raises:
        ContractError: a replay is not the rollout, and rounding does not explain it: log-prob ratios would be wrong before the first
            update. The message names the level, the sigma and the probable fault.
    """
    edges = Edges.of(trajectories)
    if not len(edges.child):
        return FirstStep()
    numbered = bool((trajectories.call[edges.child] != UNRECORDED).all())
    calls = list(_calls(trajectories, edges, numbered))
    can = numbered and policy.reproducible
    deviations: list[float] = []
    spent, rounding = 0, None
    turn = step if step < _SETTLED else _SETTLED - 1 + step // _EVERY
    for whole in calls if step == 0 else [calls[turn % len(calls)]]:
        left = len(whole.parent) if rows is None else rows - spent
        left = left if can else min(left, _PART)
        if left < 1:
            break
        some = whole if left >= len(whole.parent) else whole.below(torch.arange(left))
        spent += len(some.parent)
        exact = can and some is whole
        suspicion = Suspicion.of(policy, Call(trajectories, some))
        deviations.append(suspicion.worst)
        if not suspicion.worst <= SAME:
            _require_explained(suspicion, precision or policy.precision, exact)
        if step == 0 and rounding is None:  # measured on the first call only
            rounding = _rounding(policy, trajectories, some, exact)
    return FirstStep(max(deviations, default=None), rounding, spent)


def _calls(trajectories: TrajectoryBatch, edges: Edges, numbered: bool) -> Iterator[Edges]:
    """Stochastic edges of each network call; if the calls are not numbered, those of each level."""
    key = (trajectories.call if numbered else trajectories.level)[edges.child[edges.first]].tolist()  # of each parent
    for number in dict.fromkeys(key):
        yield edges.below(torch.tensor([place for place, known in enumerate(key) if known == number]))


def _require_explained(suspicion: Suspicion, precision: torch.dtype, exact: bool) -> None:
    """Refuse a deviation that rounding does not explain, and a policy that does not reproduce its own calls.

    Raises:
        ContractError: the deviation is larger than the policy's deviation from itself, or the latter is too large.
    """
    policy, call = suspicion.policy, suspicion.call
    repeated = suspicion.against(call.repeat(policy).mean)
    shaped = max(map(suspicion.against, _other_shapes(policy, call)))
    allowed = _MARGIN * (repeated if exact else max(repeated, shaped))
    now = policy.precision
    if suspicion.worst != suspicion.worst:
        cause = "It is not a number now: a weight or a condition is not finite."
    elif now != precision:
        cause = f"It looks like a changed type: the policy computed in {precision} when it rolled out, and in {now} now."
    elif repeated > _REPEATED.get(now, 1e-2):
        cause = "It looks like dropout, or another part of the network that draws at random: equal calls must be equal."
    elif shaped > ROUNDING.get(now, 1e-1):
        cause = (
            "It looks like rows that are mixed (batch norm, attention over a packed batch, a cache of another call), or a type "
            "less precise than that of the weights: a row must not depend on the other rows of its call."
        )
    elif float(suspicion.deviation.max()) <= max(SAME, allowed) and float(suspicion.noise.max()) <= SAME:
        return
    else:
        cause = cause_of(suspicion)
    level, sigma, following = suspicion.address()
    where = f"At level {level} (sigma {sigma:.4g} -> {following:.4g})"
    if suspicion.means_agree:
        raise ContractError(
            "first-step contract: before the first update, a replay must give the log-probabilities of the rollout. "
            f"{where} they differ by {suspicion.worst:.3g} of their size, though the means agree. {cause}"
        )
    raise ContractError(
        f"first-step contract: before the first update, a replay must give the means of the rollout. {where} the velocity differs by "
        f"{suspicion.worst:.3g} of its length; two equal calls differ by {repeated:.3g}, calls with another number of rows by {shaped:.3g}."
        f" {cause}"
    )


def _other_shapes(policy: Policy, call: Call) -> Iterator[Tensor]:
    """Evaluate all rows of a call in calls of other sizes: one by one or in parts, and each row twice. Yields means [U, *]."""
    count = len(call.edges.parent)
    for size in sorted({1 if count <= 2 * _PART else count // 3, max(1, count // 2)} - {count}):
        pieces = torch.arange(count).split(size)
        yield torch.cat([replay_parents(policy, call.trajectories, call.edges.below(piece)).mean for piece in pieces])
    yield _twice(policy, call).mean[:count]


def _twice(policy: Policy, call: Call) -> Gaussian:
    """Transition of all rows, with each row twice in one call."""
    index = torch.arange(len(call.latents)).repeat(2).to(call.latents.device)
    condition = call.condition.select(index)
    return policy.transition(call.latents[index], call.sigma()[index], call.sigma(1)[index], condition, call.eta[index])


def _rounding(policy: Policy, trajectories: TrajectoryBatch, edges: Edges, exact: bool) -> float:
    """Estimate how much rounding changes the log-probability of a path.

    The first parent is evaluated alone; if it was alone in the rollout too, it is evaluated twice in one call.
    """
    first = edges.below(torch.arange(1))
    call = Call(trajectories, first)
    again = call.repeat(policy) if exact and len(edges.parent) > 1 else _twice(policy, call)
    log_prob = again.select(first.owner).log_prob(trajectories.latents[first.child])
    levels = trajectories.level[trajectories.stochastic].unique()
    return float((log_prob - trajectories.log_prob[first.child]).abs().max()) * len(levels)


def refuse_dropout(role: str, policy: Policy) -> None:
    for name, module in policy.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise ValueError(f"role {role!r}: {name!r} has dropout {module.p:g}; replay could not be exact. Set it to 0.")
