"""Contract of policies."""

from collections.abc import Mapping

import torch
from torch import nn

from diffalign.core import Condition, Edges, Policy, Progress, Prompt, Streams, TrajectoryBatch, TrajectorySampler, check_first_step
from diffalign.policies import FlowMatchingPolicy
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler

from .elsewhere import agrees, copied, on_a_second_device
from .pretended_device import DEVICE
from .properties import Finding, NotApplicableError, Property, examine, holds, require

PROMPTS = (Prompt("three red circles"), Prompt("a blue square and a green cross"))
"""Prompts for a policy that reads any text."""


def _condition(policy: Policy) -> Condition:
    with torch.no_grad():
        first, second = policy.examples or PROMPTS
        return policy.encode([first, second, first])


def _noise(policy: Policy, count: int = 3) -> torch.Tensor:
    return policy.prior(Streams(1).normals(policy.latent_shape, "noise", [0] * count, list(range(count))))


def _velocity(policy: Policy, index: list[int], sigma: float = 0.6) -> torch.Tensor:
    latents = _noise(policy)[index]
    with torch.no_grad():
        condition = _condition(policy).select(torch.tensor(index))
        return policy.velocity(latents, latents.new_full((len(index),), sigma, dtype=policy.sigmas(_steps(policy)).dtype), condition)


def _steps(policy: Policy) -> int:
    return policy.step_counts[0] if policy.step_counts else 4


def _tolerance(policy: Policy) -> float:
    return 1e-4 if policy.precision.itemsize >= 4 else 5e-2


def _close(first: torch.Tensor, second: torch.Tensor, tolerance: float, what: str) -> None:
    scale = float(second.abs().max()) + 1e-12
    gap = float((first - second).abs().max()) / scale
    holds(gap <= tolerance, f"{what}: they differ by {gap:.2g} of the largest value; at most {tolerance:g}")


def _grid(policy: Policy) -> None:
    for steps in (1, 4, 9):
        sigmas = policy.sigmas(steps)
        holds(sigmas.shape == (steps + 1,), f"sigmas({steps}) must have {steps + 1} entries; got shape {tuple(sigmas.shape)}")
        holds(bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) == 0, f"sigmas must decrease strictly to 0; got {sigmas.tolist()}")
        holds(float(sigmas[0]) <= 1, f"sigmas must start at 1 or below; got {float(sigmas[0]):g}")


def _prior(policy: Policy) -> None:
    latents = _noise(policy)
    holds(latents.shape == (3, *policy.latent_shape), f"prior must give [3, *latent_shape]; got {tuple(latents.shape)}")
    _close(_noise(policy, 2), latents[:2], 0.0, "prior of two rows and of three")


def _shape(policy: Policy) -> None:
    velocity = _velocity(policy, [0, 1, 2])
    holds(velocity.shape == (3, *policy.latent_shape), f"velocity must have the shape of the latents; got {tuple(velocity.shape)}")
    holds(velocity.isfinite().all(), "velocity must be finite on unit noise")


def _rows_apart(policy: Policy) -> None:
    whole = _velocity(policy, [0, 1, 2])
    _close(torch.cat([_velocity(policy, [row]) for row in range(3)]), whole, _tolerance(policy), "rows alone and in a batch")
    _close(_velocity(policy, [2, 0]), whole[[2, 0]], _tolerance(policy), "rows in another order")


def _mixed_levels(policy: Policy) -> None:
    latents, condition = _noise(policy), _condition(policy)
    levels = policy.sigmas(4)[:3].to(latents.device)
    with torch.no_grad():
        together = policy.velocity(latents, levels, condition)
        alone = [policy.velocity(latents[i : i + 1], levels[i : i + 1], condition.select(torch.tensor([i]))) for i in range(3)]
    _close(torch.cat(alone), together, _tolerance(policy), "rows at different sigmas, alone and in a batch")


def _counted(policy: Policy) -> None:
    before = policy.counter.rows
    _velocity(policy, [0, 1, 2])
    added = policy.counter.rows - before
    holds(added > 0 and added % 3 == 0, f"velocity of 3 samples must add a multiple of 3 rows to self.counter; it added {added}")


def _images(policy: Policy) -> None:
    with torch.no_grad():
        images = policy.decode(_noise(policy))
    holds(images.ndim == 4 and images.shape[:2] == (3, 3), f"decode must give [K, 3, H, W]; got {tuple(images.shape)}")
    holds(images.isfinite().all(), "decoded images must be finite")


def _encodes(policy: Policy) -> None:
    condition = _condition(policy)
    holds(len(condition) == 3, f"3 prompts must give a condition of 3 rows; got {len(condition)}")
    holds(condition.ids.tolist() == [0, 1, 2], f"ids must be 0, 1, 2; got {condition.ids.tolist()}")
    for name, tensor in condition.tensors.items():
        holds(torch.equal(tensor[0], tensor[2]), f"equal prompts must be encoded equally; tensors[{name!r}] differ")
        with torch.no_grad():
            alone = policy.encode([condition.prompts[1]]).tensors[name][0]
        holds(alone.shape == tensor[1].shape, f"tensors[{name!r}] must not depend in shape on the other prompts")


def _forks(policy: Policy) -> None:
    fork = policy.fork(trainable=True)
    holds(torch.equal(_velocity(fork, [0, 1]), _velocity(policy, [0, 1])), "a fork must give the same velocity, exactly")
    mine = fork.trainable_parameters()
    if not mine:
        raise NotApplicableError("it has no weights")
    before = _velocity(policy, [0, 1])
    with torch.no_grad():
        for parameter in mine.values():
            parameter.add_(0.1)
    holds(torch.equal(_velocity(policy, [0, 1]), before), "moving a fork moved the policy it came from")
    holds(not torch.equal(_velocity(fork, [0, 1]), before), "moving all trainable weights of a fork did not change its velocity")


def _frozen_fork(policy: Policy) -> None:
    held = policy.fork().trainable_parameters()
    holds(not held, f"fork() must be frozen; {len(held)} parameters require grad (first: {next(iter(held), '')!r})")


def _gradient(policy: Policy) -> None:
    fork = policy.fork(trainable=True)
    parameters = list(fork.trainable_parameters().values())
    if not parameters:
        raise NotApplicableError("it has no weights")
    latents = _noise(fork)
    sigma = torch.full((3,), 0.6, device=latents.device, dtype=policy.sigmas(4).dtype)
    gradients = torch.autograd.grad(fork.velocity(latents, sigma, _condition(fork)).float().square().mean(), parameters, allow_unused=True)
    found = [gradient for gradient in gradients if gradient is not None]
    holds(found and any(float(gradient.abs().max()) > 0 for gradient in found), "no trainable weight gets a gradient")
    holds(all(bool(gradient.isfinite().all()) for gradient in found), "a gradient is not finite")


def _second_device(policy: Policy) -> None:
    if policy.device.type != "cpu" or next(policy.parameters(), None) is None:
        raise NotApplicableError(f"it has no weights on the CPU that could be moved; its device is {policy.device}")
    there, tolerance = _moved(policy), _tolerance(policy)
    mine, its = _condition(there), _condition(policy)
    for name, tensor in its.tensors.items():
        whole = not tensor.is_floating_point()  # integers, such as lengths, may stay on the host
        agrees(mine.tensors[name], tensor, f"encode's tensors[{name!r}]", tolerance, anywhere=whole)
    agrees(_noise(there), _noise(policy), "prior", tolerance)
    agrees(_velocity(there, [0, 2]), _velocity(policy, [0, 2]), "velocity", tolerance)
    with torch.no_grad():
        agrees(there.decode(_noise(there)), policy.decode(_noise(policy)), "decode", tolerance)
    steps = _steps(policy)
    samplers: list[TrajectorySampler] = [DeterministicSampler(steps)]
    samplers += [TreeSampler(steps, FixedPlan((1,), branches=2))] if steps > 2 else []
    for sampler in samplers:
        try:
            here = _forest(policy, sampler)
        except ValueError:  # the step rule has no noise
            continue
        forest = _forest(there, sampler)
        agrees(forest.latents, here.latents, "a rollout", 10 * tolerance)  # of several calls
        if len(Edges.of(forest).child):
            check_first_step(there, forest)


def _forest(policy: Policy, sampler: TrajectorySampler) -> TrajectoryBatch:
    with torch.no_grad():
        return sampler.sample(policy, _condition(policy), Progress(0, 1), Streams(1))


def _moved(policy: Policy) -> Policy:
    """Copy a policy to the pretended device."""
    twin = copied(policy)
    for module in twin.modules():
        if isinstance(module, Policy):
            module.shares_tensors = False  # the original shares tensors with its forks, the copy does not
    try:
        twin.to(DEVICE)
    except Exception as error:  # quantised weights, for instance
        raise NotApplicableError(f"it cannot be moved: {error}") from error
    for module in twin.modules():
        if isinstance(module, FlowMatchingPolicy):  # set what loading on that device would set
            module.family.placed(torch.device(DEVICE), module.family.dtype)
            for part in module.family.pipeline.components.values():
                if isinstance(part, nn.Module) and not module.family.setting.offload:
                    part.to(DEVICE)
    return twin


POLICY: tuple[Property[Policy], ...] = (
    Property("grid", "a sampler steps along it, and the last level is the picture", _grid),
    Property("prior", "equal noise must give equal starts, however prompts are batched", _prior),
    Property("velocity shape", "it is added to the latents", _shape),
    Property("rows apart", "replay evaluates rows in other batches than the rollout, so ratios would not be 1", _rows_apart),
    Property("mixed levels", "an update replays edges of several levels in one call", _mixed_levels),
    Property("counted rows", "the ledger and every cost in reports come from the counter", _counted),
    Property("images", "rewards take [K, 3, H, W]", _images),
    Property("conditions", "a group is compared under one condition, wherever its prompt stands in the batch", _encodes),
    Property("forks", "reference, old and average weights are forks", _forks),
    Property("frozen forks", "a reference that requires gradients would be refused", _frozen_fork),
    Property("gradient", "nothing would be learned", _gradient),
    on_a_second_device(_second_device),
)


def check_policy(policy: Policy, skip: Mapping[str, str] | None = None) -> list[Finding]:
    """Check a policy; its weights are not changed.

    Args:
        policy: the part
        skip: property name -> why it need not hold

    Raises:
        PropertyError: a property does not hold; the message names each such property, its meaning, and what happened.
    """
    return require(type(policy).__name__, examine(policy, POLICY, skip))
