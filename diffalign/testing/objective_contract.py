"""Contract of objectives."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from diffalign.core import AlignmentLoop, RewardFunction
from diffalign.core.report import Metrics
from diffalign.core.update import phases_of, yielded
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts

from .elsewhere import agrees, on_a_second_device
from .held_policies import require_apart
from .objective_subject import PROMPTS, Make, Subject, everyone, first_coordinate, gradients, losses, subject_of
from .pretended_device import DEVICE
from .properties import Finding, NotApplicableError, Property, examine, holds, require
from .resumption import require_resumption
from .sample_order import alike, turned

_ROUNDING = 1e-5
"""Relative gaps below this are as small as the rounding of float32."""

_FLOAT32 = (
    "This looks like float32 rounding: the contract computes in float64, so a network of your own must take the type of the policy's "
    "weights, torch.promote_types(policy.precision, torch.float32), and numbers must not be cast to float32"
)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str, tolerance: float = 1e-8) -> None:
    for role, gradient in other.items():
        gap, scale = float((one[role] - gradient).norm()), float(gradient.norm())
        rounding = f". {_FLOAT32}" if 0 < tolerance * scale < gap < _ROUNDING * scale else ""
        holds(
            gap <= tolerance * max(scale, 1e-9),
            f"{what}: the gradient of {role!r} differs by {gap:.3g} (its norm is {scale:.3g}){rounding}",
        )


def _trains(subject: Subject) -> None:
    objective = subject.moved()
    for role, gradient in gradients(objective, subject.batch(objective)).items():
        holds(gradient.isfinite().all(), f"the gradient of {role!r} is not finite")
        holds(float(gradient.norm()) > 0, f"{role!r} gets no gradient")


def _isolated(subject: Subject) -> None:
    objective = subject.moved()
    batch = subject.batch(objective)
    policies = everyone(objective)
    before = {name: [p.detach().clone() for p in policy.parameters()] for name, policy in policies.items()}
    for phase in phases_of(objective):
        for policy in policies.values():
            policy.zero_grad(set_to_none=True)
        for loss in yielded(phase, batch, 0):
            if loss.value.requires_grad:
                loss.value.backward()
        mine = {id(p) for policy in phase.trains.values() for p in policy.trainable_parameters().values()}
        for name, policy in policies.items():
            leaked = [key for key, p in policy.named_parameters() if p.grad is not None and id(p) not in mine]
            holds(not leaked, f"the phase that trains {', '.join(phase.trains)} leaves a gradient in {name!r}: {leaked[:1]}")
    for name, policy in policies.items():
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
    even = alike(batch)
    _same(
        gradients(objective, attrs.evolve(even, trajectories=turned(even.trajectories))),
        gradients(objective, even),
        "equal rewards, with the samples of each prompt in another order (usually a tie is broken by the place of a sample, as argmax "
        "does: leave out groups of equal rewards)",
        1e-6,
    )


def _grad_mode(subject: Subject) -> None:
    objective = subject.moved()
    batch = subject.batch(objective)
    for phase in phases_of(objective):
        for _ in yielded(phase, batch, 0):
            holds(
                torch.is_grad_enabled(),
                "losses are yielded inside no_grad, which leaks into the loop's backward; leave it before each yield",
            )


def _metrics(subject: Subject) -> None:
    objective = subject.moved()
    for _, loss in losses(objective, subject.batch(objective)):
        try:
            Metrics().take(loss, type(objective).__name__)
        except ValueError as error:
            raise AssertionError(str(error)) from error
        for name, (total, count) in loss.metrics.items():
            holds(bool(torch.as_tensor(total).isfinite().all()) and float(count) > 0, f"metric {name!r} must be a finite (sum, count > 0)")


def _learns(subject: Subject) -> None:
    up, down = _taught(subject, first_coordinate), _taught(subject, lambda images, prompts: 1 - first_coordinate(images, prompts))
    holds(
        up > 0.05,
        f"40 steps with the reward sigmoid(x) must move the mean of a Gaussian to larger x; it went from 0 to {up:.3f}",
    )
    holds(
        up - down > 0.1,
        f"40 steps with the reward sigmoid(x) must move the mean of a Gaussian to larger x than 40 with 1 - sigmoid(x) and the same noise; "
        f"they moved it to {up:.3f} and {down:.3f}" + ("; does the loss read `batch.rewards`?" if up == down else ""),
    )


def _taught(subject: Subject, reward: RewardFunction) -> float:
    """First coordinate to which 40 steps with a reward move the mean of a Gaussian, from 0. Equal seeds give equal noise."""
    policy = GaussianMixturePolicy([[0.0, 0.0]], scale=1.0, shift=2.0)
    loop = AlignmentLoop(
        objective=subject.make(policy),
        sampler=subject.sampler,
        rewards=reward,
        prompts=Prompts(["x"]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.05)},
        check_rows=0,
    )
    loop.advance(40)
    return policy.means[0, 0].item()


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
    loop = subject.loop()
    loop.advance(2)
    return {f"{role}.{name}": tensor.detach() for role, policy in loop.policies().items() for name, tensor in policy.named_parameters()}


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
    Property(
        "frozen reference", "an optimizer or a stray gradient could move what the weights are held to, a teacher as well", require_apart
    ),
    Property("resumes", "a run that is continued from a checkpoint would go another way", require_resumption),
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
