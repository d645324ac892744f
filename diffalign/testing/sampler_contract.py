"""Contract of trajectory samplers."""

from collections.abc import Mapping

import torch

from diffalign.core import (
    Condition,
    Edges,
    Policy,
    Progress,
    Prompt,
    Streams,
    TrajectoryBatch,
    TrajectorySampler,
    check_first_step,
    replay,
)
from diffalign.core.rollout import require_forest
from diffalign.core.transition import expand

from .doubles import TinyPolicy
from .elsewhere import agrees, copied, on_a_second_device
from .pretended_device import DEVICE
from .properties import Finding, NotApplicableError, Property, examine, holds, require

PROMPTS = (Prompt("a red cube"), Prompt("two blue stars"), Prompt("a red cube"))
STREAMS = Streams(5, 3)


def _policy() -> TinyPolicy:
    return TinyPolicy((2, 2), dtype=torch.float64)


def _draw(
    sampler: TrajectorySampler, policy: Policy, index: tuple[int, ...] = (0, 1, 2), step: int = 3, streams: Streams = STREAMS
) -> TrajectoryBatch:
    condition = policy.encode([PROMPTS[i] for i in index])
    with torch.no_grad():
        return require_forest(
            sampler,
            sampler.sample(policy, Condition(condition.prompts, torch.tensor(index), condition.tensors), Progress(step, 10, 0.4), streams),
        )


def _finished(sampler: TrajectorySampler) -> None:
    forest = _draw(sampler, _policy())
    counts = torch.bincount(forest.group, minlength=3).tolist()
    holds(min(counts) > 0 and len(set(counts)) == 1, f"every prompt must get equally many finished samples; got {counts}")
    holds(forest.latents.isfinite().all(), "latents must be finite")


def _depth_first(sampler: TrajectorySampler) -> None:
    forest = _draw(sampler, _policy())
    paths = forest.paths.tolist()
    holds(paths == sorted(paths), "leaves must be in depth-first order: siblings next to each other, by prompt, root, branch")
    holds(forest.group.tolist() == sorted(forest.group.tolist()), "leaves must be in the order of the prompts")


def _repeatable(sampler: TrajectorySampler) -> None:
    one, other = _draw(sampler, _policy()), _draw(sampler, _policy())
    holds(torch.equal(one.latents, other.latents), "equal arguments must give equal forests: draw from `streams` alone")
    moved = _draw(sampler, _policy(), streams=Streams(6, 3))
    same = one.latents.shape == moved.latents.shape and torch.equal(one.samples, moved.samples)
    holds(not same, "another seed must give other samples")


def _prompts_apart(sampler: TrajectorySampler) -> None:
    whole = _draw(sampler, _policy())
    for place in range(3):
        alone = _draw(sampler, _policy(), index=(place,))
        mine = whole.samples[whole.group == place]
        holds(alone.samples.shape == mine.shape, "a prompt must get as many samples alone as in a batch")
        gap = float((alone.samples - mine).abs().max())
        holds(gap < 1e-9, f"samples of prompt {place} must not depend on the other prompts of the batch; they differ by {gap:.2g}")
    first, third = (whole.samples[whole.group == place] for place in (0, 2))
    holds(not torch.equal(first, third), "equal texts with different ids must get different noise")


def _log_probs(sampler: TrajectorySampler) -> None:
    policy = _policy()
    forest = _draw(sampler, policy)
    edges = Edges.of(forest)
    if not len(edges.child):
        raise NotApplicableError("it is deterministic")
    with torch.no_grad():
        again = replay(policy, forest, edges)
    gap = float(((again.mean - forest.mean[edges.row]).abs() / expand(again.std, again.mean)).max())
    holds(gap < 1e-6, f"stored means must be those of policy.transition; they differ by {gap:.2g} std")
    log_prob = again.log_prob(forest.latents[edges.child])
    gap = float((log_prob - forest.log_prob[edges.child]).abs().max())
    holds(gap < 1e-6, f"stored log-probs must be those of policy.transition at the stored states; they differ by {gap:.2g}")
    check_first_step(policy, forest)


def _deterministic_edges(sampler: TrajectorySampler) -> None:
    policy = _policy()
    forest = _draw(sampler, policy)
    still = ((forest.parent >= 0) & (forest.noise_level == 0)).nonzero().squeeze(1)
    if not len(still):
        raise NotApplicableError("it has no deterministic edge")
    with torch.no_grad():
        for node in still.tolist():
            parent = forest.parent[node : node + 1]
            state = forest.latents[parent]
            condition = forest.condition.select(forest.prompt[parent])
            for level in range(int(forest.level[parent]), int(forest.level[node])):
                sigma, following = (forest.sigmas[i : i + 1] for i in (level, level + 1))
                state = policy.transition(state, sigma, following, condition, torch.zeros(1)).mean
            gap = float((state[0] - forest.latents[node]).abs().max())
            holds(
                gap < 1e-9,
                f"node {node} has noise level 0, but is not where the deterministic steps from its parent lead: off by {gap:.2g}",
            )


def _siblings(sampler: TrajectorySampler) -> None:
    forest = _draw(sampler, _policy())
    noisy = forest.stochastic
    if not len(noisy):
        raise NotApplicableError("it is deterministic")
    values = forest.latents[noisy].flatten(1)
    distances = torch.cdist(values, values) + torch.eye(len(values)) * 9
    holds(float(distances.min()) > 0, "two stochastic edges lead to the same state: siblings must draw noise of their own")


def _over_time(sampler: TrajectorySampler) -> None:
    counts = {len(_draw(sampler, _policy(), step=step, streams=Streams(5, step)).leaves) for step in range(10)}
    holds(len(counts) == 1, f"the number of samples must stay constant over a run; got {sorted(counts)}")


def _second_device(sampler: TrajectorySampler) -> None:
    policy = _policy().to(DEVICE)
    here, there = _draw(copied(sampler), _policy()), _draw(copied(sampler), policy)
    for name in ("latents", "mean", "log_prob"):
        agrees(getattr(there, name), getattr(here, name), f"{name} of the forest", 1e-9)
    for name in ("sigmas", "noise_level", "level", "parent", "prompt"):
        agrees(getattr(there, name), getattr(here, name), f"{name} of the forest", 1e-9, anywhere=True)
    agrees(there.group, here.group, "the group of each sample", 0.0)
    agrees(there.path_sum(there.log_prob), here.path_sum(here.log_prob), "log-probs of the paths", 1e-9)
    if len(Edges.of(there).child):
        check_first_step(policy, there)


SAMPLER: tuple[Property[TrajectorySampler], ...] = (
    Property("finished samples", "groups of unequal size weigh their samples unequally", _finished),
    Property("depth-first leaves", "images, rewards and prompts are matched by this order", _depth_first),
    Property("repeatable", "a resumed run would go another way", _repeatable),
    Property("prompts apart", "results would depend on batching and on the number of processes", _prompts_apart),
    Property("log-probs", "ratios would be wrong before the first update", _log_probs),
    Property("deterministic edges", "a stage that is replayed would not be the one that was sampled", _deterministic_edges),
    Property("siblings differ", "branches that share noise are one sample counted twice", _siblings),
    Property("constant number", "a group that shrinks in the course of a run changes the objective", _over_time),
    on_a_second_device(_second_device),
)


def check_sampler(sampler: TrajectorySampler, skip: Mapping[str, str] | None = None) -> list[Finding]:
    """Check a sampler on a small policy whose velocity depends on the prompt.

    Args:
        sampler: the part
        skip: property name -> why it need not hold

    Raises:
        PropertyError: a property does not hold; the message names each such property, its meaning, and what happened.
    """
    return require(type(sampler).__name__, examine(sampler, SAMPLER, skip))
