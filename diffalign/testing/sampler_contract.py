"""Contract of trajectory samplers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.core import (
    ROOT,
    Condition,
    Edges,
    Outline,
    Policy,
    Progress,
    Prompt,
    Streams,
    TrajectoryBatch,
    TrajectorySampler,
    check_first_step,
    replay,
)
from diffalign.core.replay import replay_parents
from diffalign.core.rollout import require_forest
from diffalign.core.transition import expand
from diffalign.core.types import UNRECORDED
from diffalign.samplers import Branches, Branching

from .doubles import TinyPolicy
from .elsewhere import agrees, copied, on_a_second_device
from .fresh_noise import require_fresh_noise
from .pretended_device import DEVICE
from .properties import Finding, NotApplicableError, Property, examine, holds, require

PROMPTS = (Prompt("a red cube"), Prompt("two blue stars"), Prompt("a red cube"))
PROGRESS, STREAMS = Progress(3, 10, 0.4), Streams(5, 3)

_STEPS = 20
"""Steps of a run that are drawn to see whether they differ."""


def _policy() -> TinyPolicy:
    return TinyPolicy((2, 2), dtype=torch.float64)


def _draw(
    sampler: TrajectorySampler,
    policy: Policy,
    index: tuple[int, ...] = (0, 1, 2),
    progress: Progress = PROGRESS,
    streams: Streams = STREAMS,
) -> TrajectoryBatch:
    condition = policy.encode([PROMPTS[i] for i in index])
    condition = Condition(condition.prompts, torch.tensor(index), condition.tensors)
    with torch.no_grad():
        return require_forest(sampler, sampler.sample(policy, condition, progress, streams))


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


def _fresh_noise(sampler: TrajectorySampler) -> None:
    policy = _policy()
    forest = _draw(sampler, policy)
    if not len(forest.stochastic):
        raise NotApplicableError("it is deterministic")
    require_fresh_noise(policy, forest)


def _over_time(sampler: TrajectorySampler) -> None:
    counts = {len(_draw(sampler, _policy(), progress=Progress(step, 10, 0.4), streams=Streams(5, step)).leaves) for step in range(10)}
    holds(len(counts) == 1, f"the number of samples must stay constant over a run; got {sorted(counts)}")


def _steps_of_a_run(sampler: TrajectorySampler) -> list[TrajectoryBatch]:
    """Forests of one prompt at the steps of a run in which the reward rises, so that plans move."""
    steps = [Progress(step, _STEPS, step / _STEPS if step else None) for step in range(_STEPS)]
    return [_draw(sampler, _policy(), (0,), progress, Streams(5, progress.step)) for progress in steps]


def _etas(forest: TrajectoryBatch) -> list[list[float]]:
    """Noise levels of the edges that cross each denoising step, each once: [T]. A forest of finished samples alone has no edges."""
    etas: list[set[float]] = [set() for _ in range(len(forest.sigmas) - 1)]
    level, parent, eta = forest.level.tolist(), forest.parent.tolist(), forest.noise_level.tolist()
    for node, above in enumerate(parent):
        for step in range(level[above], level[node]) if above != ROOT else ():
            etas[step].add(eta[node])
    return [sorted(found) or [0.0] for found in etas]


def _widths(forest: TrajectoryBatch) -> dict[int, int]:
    """Number of nodes of each level that is stored; level -1: of those without a parent."""
    levels, counts = forest.level.unique(return_counts=True)
    return {ROOT: int((forest.parent == ROOT).sum()), **dict(zip(levels.tolist(), counts.tolist(), strict=True))}


def _differ(values: Sequence[object]) -> bool:
    return any(value != values[0] for value in values)


def _require_noise(said: Sequence[float], forests: Sequence[TrajectoryBatch], where: str) -> None:
    """Check noise levels that were said beforehand: exactly if the steps of a run are alike, else only whether there are any."""
    drawn = [_etas(forest) for forest in forests]
    noisy = {len(forest.stochastic) > 0 for forest in forests}
    if len(noisy) == 1:
        holds(
            noisy == {any(said)},
            f"{where} says that {_some(any(said))} of the steps are stochastic, and {_some(*noisy)} of those drawn are",
        )
    if _differ(drawn):
        return
    holds(len(said) == len(drawn[0]), f"{where} says {len(said)} steps, and {len(drawn[0])} were drawn")
    for step, (eta, found) in enumerate(zip(said, drawn[0], strict=True)):
        fits = any(math.isclose(eta, known, rel_tol=1e-5) for known in found)
        holds(fits, f"{where} says eta {eta:g} for step {step}; drawn was {', '.join(f'{known:g}' for known in found)}")


def _some(any_of_them: bool) -> str:
    return "some" if any_of_them else "none"


def _is_close(said: Tensor, grid: Tensor) -> bool:
    return said.shape == grid.shape and float((said - grid).abs().max()) < 1e-5


def _outline(sampler: TrajectorySampler) -> None:
    outline: Any = sampler.outline(_policy())
    if outline is None:
        raise NotApplicableError("it has no outline, so nothing is known before it draws")
    holds(isinstance(outline, Outline), f"outline(policy) must give an Outline or None; it gave {type(outline).__name__}")
    forests = _steps_of_a_run(sampler)
    for forest in forests:
        count = len(forest.leaves)
        holds(outline.samples == count, f"outline(policy) says {outline.samples} samples of a prompt, and {count} were drawn")
    _require_noise(outline.noise_levels, forests, "outline(policy)")
    grids: list[Tensor] = [forest.sigmas.cpu().double() for forest in forests]
    said = outline.sigmas.cpu().double()
    if _differ([grid.tolist() for grid in grids]):
        for grid in grids:
            sigmas = ", ".join(f"{level:.4g}" for level in grid.tolist())
            known = any(_is_close(other.cpu().double(), grid) for other in outline.grids)
            holds(known, f"a forest has the sigmas {sigmas}, which are no grid of outline(policy); give it in `Outline.others`")
    else:
        holds(len(said) == len(grids[0]), f"outline(policy) must have the {len(grids[0])} sigmas of the forest; it has {len(said)}")
        gap = float((said - grids[0]).abs().max())
        holds(gap < 1e-5, f"the sigmas of outline(policy) must be those of the forest; they differ by {gap:.2g}")


def _branching(sampler: TrajectorySampler) -> None:
    if not isinstance(sampler, Branches):
        raise NotApplicableError("it has no branching(), so nothing is forecast")
    said: Any = sampler.branching()
    holds(isinstance(said, Branching), f"branching() must give a Branching; it gave {type(said).__name__}")
    forests = _steps_of_a_run(sampler)
    _require_noise(said.noise_levels, forests, "branching()")
    for forest in forests:
        count, steps = len(forest.leaves), len(forest.sigmas) - 1
        holds(said.leaves == count, f"branching() says {said.leaves} samples of a prompt, and {count} were drawn")
        holds(len(said.children) >= steps, f"branching() says {len(said.children)} steps, fewer than the {steps} that were drawn")
    drawn = [_widths(forest) for forest in forests]
    if _differ(drawn):  # then it is that of the step that needs the most memory, which may be none of these
        return
    for level, count in drawn[0].items():
        width, where = (said.roots, "roots") if level == ROOT else (said.widths[level], f"nodes on level {level}")
        holds(width == count, f"branching() says {width} {where} of a prompt, and {count} were drawn")


def _calls(sampler: TrajectorySampler) -> None:
    seen: list[Tensor] = []
    policy = _policy()
    policy.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0].detach().clone()))
    forest = _draw(sampler, policy)
    edges, drawn = Edges.of(forest), list(seen)
    numbers = forest.call[edges.child]
    if not len(edges.child):
        raise NotApplicableError("it is deterministic")
    if bool((numbers == UNRECORDED).all()):
        raise NotApplicableError("it does not number its network calls, so a part of each is repeated")
    for number in numbers[numbers != UNRECORDED].unique().tolist():
        seen.clear()
        parents = edges.owner[numbers == number].unique()
        with torch.no_grad():
            replay_parents(policy, forest, edges.below(parents))
        holds(
            any(torch.equal(rows, seen[0]) for rows in drawn),
            f"call {number} must have had the {len(parents)} parents of its edges as its rows, in their order, and no others; the calls of "
            f"the rollout had {', '.join(str(len(rows)) for rows in drawn)} rows",
        )


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
    Property("fresh noise", "steps that share noise are no draws of the transitions whose log-probs are stored", _fresh_noise),
    Property("constant number", "a group that shrinks in the course of a run changes the objective", _over_time),
    Property("outline", "objectives accept or refuse a sampler by it, before anything is drawn", _outline),
    Property("branching", "samples, rows and memory of a run would be forecast wrongly", _branching),
    Property("network calls", "the first-step contract would repeat calls that the rollout did not make", _calls),
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
