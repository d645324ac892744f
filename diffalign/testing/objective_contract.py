"""Contract of objectives."""

import inspect
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    AlignmentLoop,
    Condition,
    Loss,
    Objective,
    Policy,
    Progress,
    Prompt,
    ScoredBatch,
    Streams,
    TrajectoryBatch,
    TrajectorySampler,
)
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler

from .doubles import TinyPolicy
from .elsewhere import agrees, on_a_second_device, prepare_second_device
from .pretended_device import DEVICE
from .properties import Finding, NotApplicableError, Property, examine, holds, require

Make = Callable[[Policy], Objective]
"""Function that builds the objective around the policy that it trains."""

PROMPTS = (Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks"))
STEPS = 5
SAMPLERS: tuple[TrajectorySampler, ...] = (
    TreeSampler(STEPS, FixedPlan((1, 2), branches=3)),
    DeterministicSampler(STEPS, samples=6),
    DeterministicSampler(4, samples=6),
)


@attrs.frozen(eq=False)
class Subject:
    """Objective that is checked, with a sampler of trajectories that it accepts.

    Args:
        make: function that builds it
        sampler: the first sampler of `check_objective` whose batches it accepts
        device: device of its policies
    """

    make: Make
    sampler: TrajectorySampler
    device: str = "cpu"

    def policy(self) -> TinyPolicy:
        """Build the policy that the objective trains."""
        return TinyPolicy((2, 2), dtype=torch.float64).to(self.device)

    def moved(self, **changes: int) -> Objective:
        """Build the objective, with some fields changed, in a state as after some updates: all weights that it trains have moved.

        Every role moves in another direction. If one is built as a copy of another (a fake score of its teacher), their difference is zero
        at the start, and a loss of zero would pass every check.
        """
        objective = self.make(self.policy())
        objective = attrs.evolve(objective, **changes) if changes else objective  # type: ignore[misc]
        with torch.no_grad():
            for place, policy in enumerate(_trained(objective).values(), 1):
                for parameter in policy.trainable_parameters().values():
                    parameter.add_(0.1 * place)
        return objective

    def batch(self, objective: Objective, index: tuple[int, ...] = (0, 1, 2), constant: bool = False) -> ScoredBatch:
        """Batch of one process in a step on all prompts: the prompts in `index`, with the deviation of the rewards of the whole step."""
        forest = self._forest(objective, index)
        rewards = _scores(forest, constant)
        step = rewards if len(index) == len(PROMPTS) else _scores(self._forest(objective, tuple(range(len(PROMPTS)))), constant)
        deviation = float(step.double().std(unbiased=False))
        return ScoredBatch(forest, rewards, {"r": rewards}, len(index), Progress(2, 10), Streams(1, 2), deviation)

    def _forest(self, objective: Objective, index: tuple[int, ...]) -> TrajectoryBatch:
        policy = objective.behavior()
        condition = policy.encode([PROMPTS[i] for i in index])
        condition = Condition(condition.prompts, torch.tensor(index), condition.tensors)
        with torch.no_grad():
            return self.sampler.sample(policy, condition, Progress(2, 10), Streams(1, 2))


def _scores(forest: TrajectoryBatch, constant: bool) -> Tensor:
    rewards = forest.samples.flatten(1)[:, 0].sigmoid().float()
    return torch.full_like(rewards, 0.5) if constant else rewards


def _trained(objective: Objective) -> dict[str, Policy]:
    """Trained weights by role, over all phases."""
    return {role: policy for phase in objective.phases() for role, policy in phase.trains.items()}


def losses(objective: Objective, batch: ScoredBatch) -> list[tuple[Mapping[str, Policy], Loss]]:
    """Micro-batches of the first update of every phase, with the weights that the phase trains. No weight moves."""
    return [(phase.trains, loss) for phase in objective.phases() for loss in phase.losses(batch, 0)]


def gradients(objective: Objective, batch: ScoredBatch) -> dict[str, Tensor]:
    """Compute the flat gradient of the first update, by role."""
    for policy in _everyone(objective).values():
        policy.zero_grad(set_to_none=True)
    for _, loss in losses(objective, batch):
        if loss.value.requires_grad:
            loss.value.backward()
    return {role: _flat(policy) for role, policy in _trained(objective).items()}


def _flat(policy: Policy) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.trainable_parameters().values()])


def _everyone(objective: Objective) -> dict[str, Policy]:
    return {**objective.policies(), "policy": objective.policy, "behavior": objective.behavior()}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str, tolerance: float = 1e-8) -> None:
    for role, gradient in other.items():
        gap, scale = float((one[role] - gradient).norm()), float(gradient.norm())
        holds(gap <= tolerance * max(scale, 1e-9), f"{what}: the gradient of {role!r} differs by {gap:.3g} (its norm is {scale:.3g})")


def _trains(subject: Subject) -> None:
    objective = subject.moved()
    for role, gradient in gradients(objective, subject.batch(objective)).items():
        holds(gradient.isfinite().all(), f"the gradient of {role!r} is not finite")
        holds(float(gradient.norm()) > 0, f"{role!r} gets no gradient")


def _isolated(subject: Subject) -> None:
    objective = subject.moved()
    batch = subject.batch(objective)
    everyone = _everyone(objective)
    before = {name: [p.detach().clone() for p in policy.parameters()] for name, policy in everyone.items()}
    for phase in objective.phases():
        for policy in everyone.values():
            policy.zero_grad(set_to_none=True)
        for loss in phase.losses(batch, 0):
            if loss.value.requires_grad:
                loss.value.backward()
        mine = {id(p) for policy in phase.trains.values() for p in policy.trainable_parameters().values()}
        for name, policy in everyone.items():
            leaked = [key for key, p in policy.named_parameters() if p.grad is not None and id(p) not in mine]
            holds(not leaked, f"the phase that trains {', '.join(phase.trains)} leaves a gradient in {name!r}: {leaked[:1]}")
    for name, policy in everyone.items():
        same = all(torch.equal(p, old) for p, old in zip(policy.parameters(), before[name], strict=True))
        holds(same, f"computing losses moved the weights of {name!r}; the loop steps, an objective does not")


def _repeatable(subject: Subject) -> None:
    one, other = subject.moved(), subject.moved()
    _same(gradients(one, subject.batch(one)), gradients(other, subject.batch(other)), "the same batch twice", tolerance=0.0)


def _denominator(subject: Subject) -> None:
    objective = subject.moved()
    batch = subject.batch(objective)
    whole = gradients(objective, batch)
    half = gradients(objective, attrs.evolve(batch, groups=2 * batch.groups))
    _same({role: 2 * value for role, value in half.items()}, whole, "with twice as many groups in the step, half the loss")


def _groups_apart(subject: Subject) -> None:
    objective = subject.moved()
    whole = gradients(objective, subject.batch(objective))
    alone = [gradients(objective, subject.batch(objective, index=(place,))) for place in range(len(PROMPTS))]
    mean = {role: sum((part[role] for part in alone), torch.zeros_like(value)) / len(PROMPTS) for role, value in whole.items()}
    _same(mean, whole, "the mean over prompts of their gradients alone, and that of the batch")


def _order(subject: Subject) -> None:
    objective = subject.moved()
    _same(
        gradients(objective, subject.batch(objective, (2, 0, 1))),
        gradients(objective, subject.batch(objective)),
        "prompts in another order (usually numbers are drawn by torch.randn or by the place in the batch: draw them by batch.streams with "
        "the prompt's id; or a statistic runs on from prompt to prompt)",
    )


def _budget(subject: Subject) -> None:
    objective = subject.moved()
    if not hasattr(objective, "rows"):
        raise NotApplicableError("it has no attribute `rows`")
    whole = gradients(objective, subject.batch(objective))
    for rows in (1, 4):
        try:
            chunked = subject.moved(rows=rows)
        except (attrs.exceptions.NotAnAttrsClassError, TypeError) as error:
            raise NotApplicableError("it is no attrs class, so it cannot be built again with another `rows`") from error
        _same(gradients(chunked, subject.batch(chunked)), whole, f"with {rows} rows a micro-batch")


def _equal_rewards(subject: Subject) -> None:
    objective = subject.moved()
    batch = subject.batch(objective, constant=True)
    shifted = attrs.evolve(batch, rewards=batch.rewards + 0.25)
    _same(gradients(objective, shifted), gradients(objective, batch), "equal rewards of 0.5 and of 0.75 teach nothing about samples", 1e-6)


def _grad_mode(subject: Subject) -> None:
    objective = subject.moved()
    batch = subject.batch(objective)
    for phase in objective.phases():
        for _ in phase.losses(batch, 0):
            holds(
                torch.is_grad_enabled(),
                "losses are yielded inside no_grad, which leaks into the loop's backward; leave it before each yield",
            )


def _metrics(subject: Subject) -> None:
    objective = subject.moved()
    for _, loss in losses(objective, subject.batch(objective)):
        for name, (total, count) in loss.metrics.items():
            holds(bool(torch.as_tensor(total).isfinite().all()) and float(count) > 0, f"metric {name!r} must be a finite (sum, count > 0)")


def _frozen(subject: Subject) -> None:
    objective = subject.moved()
    kind: Callable[..., Objective] = type(objective)
    parameters = inspect.signature(kind).parameters
    held = [name for name in ("reference", "teacher") if name in parameters and "Policy" in str(parameters[name].annotation)]
    if not held:
        raise NotApplicableError("its constructor has no parameter `reference` or `teacher` that is a Policy")
    for name in held:
        policy = subject.policy()
        try:
            kind(policy, **{name: policy.fork(trainable=True)})
        except ValueError:
            continue
        raise AssertionError(f"a {name} whose weights require gradients must be refused")


def _learns(subject: Subject) -> None:
    policy = GaussianMixturePolicy([[0.0, 0.0]], scale=1.0, shift=2.0)
    loop = AlignmentLoop(
        objective=subject.make(policy),
        sampler=subject.sampler,
        rewards=_first_coordinate,
        prompts=Prompts(["x"]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.05)},
        check_rows=0,
    )
    before = policy.means[0, 0].item()
    loop.advance(40)
    after = policy.means[0, 0].item()
    holds(
        after > before + 0.05,
        f"40 steps with the reward sigmoid(x) must move the mean of a Gaussian to larger x; it went from {before:.3f} to {after:.3f}",
    )


def _second_device(subject: Subject) -> None:
    away = attrs.evolve(subject, device=DEVICE)
    here, there = subject.moved(), away.moved()
    batch, its = subject.batch(here), away.batch(there)
    for (_, mine), (_, other) in zip(losses(there, its), losses(here, batch), strict=True):
        agrees(mine.value.detach(), other.value.detach(), "a loss", 1e-8)
    theirs = gradients(there, its)
    for role, gradient in gradients(here, batch).items():
        agrees(theirs[role], gradient, f"the gradient of {role!r}", 1e-8)
    after = _stepped(away)
    for name, weights in _stepped(subject).items():
        agrees(after[name], weights, f"{name} after two steps", 1e-8)


def _stepped(subject: Subject) -> dict[str, Tensor]:
    """Weights of all roles after two steps of the loop, including averages and old weights."""
    loop = AlignmentLoop(
        objective=subject.make(subject.policy()),
        sampler=subject.sampler,
        rewards=_first_coordinate,
        prompts=Prompts(PROMPTS),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        check_rows=0,
    )
    loop.advance(2)
    return {f"{role}.{name}": tensor.detach() for role, policy in loop.policies().items() for name, tensor in policy.named_parameters()}


def _first_coordinate(images: Tensor, prompts: object) -> Tensor:
    return ((images[:, 0, 0, 0] - 0.5) * 16).sigmoid()


OBJECTIVE: tuple[Property[Subject], ...] = (
    Property("trains", "nothing would be learned", _trains),
    Property("isolated roles", "one role's loss would move another's weights", _isolated),
    Property("repeatable", "a resumed run would go another way: draw from batch.streams alone", _repeatable),
    Property("global denominator", "the learning rate would depend on the number of processes", _denominator),
    Property("groups apart", "samples of different prompts would be compared", _groups_apart),
    Property("order of prompts", "results would depend on batching", _order),
    Property("row budget", "results would depend on memory", _budget),
    Property("equal rewards", "a prompt whose samples are equally good would teach something about the reward's level", _equal_rewards),
    Property("grad mode", "the loop's backward would fail or be wrong", _grad_mode),
    Property("metrics", "they are added over micro-batches and processes, then divided", _metrics),
    Property("frozen reference", "an optimizer or a stray gradient could move what the weights are held to, a teacher as well", _frozen),
    Property("learns", "the sign is wrong, or the reward does not reach the weights", _learns),
    on_a_second_device(_second_device, gradients=True),
)


def check_objective(make: Make, skip: Mapping[str, str] | None = None) -> list[Finding]:
    """Check an objective on small closed-form policies.

    Args:
        make: the class of the objective, or a function that builds it from a policy
        skip: property name -> why it need not hold

    Raises:
        PropertyError: a property does not hold; the message names each such property, its meaning, and what happened.
        ValueError: the objective refuses every kind of batch.
    """
    return require(getattr(make, "__name__", "objective"), examine(subject_of(make), OBJECTIVE, skip))


def subject_of(make: Make) -> Subject:
    """Find trajectories that the objective accepts: stochastic trees, else deterministic ones."""
    prepare_second_device()
    refusals = []
    for sampler in SAMPLERS:
        subject = Subject(make, sampler)
        try:
            objective = subject.moved()
            losses(objective, subject.batch(objective))
        except ValueError as error:
            refusals.append(f"{sampler}: {error}")
        else:
            return subject
    raise ValueError("the objective refuses every batch it was offered:\n" + "\n".join(refusals))
