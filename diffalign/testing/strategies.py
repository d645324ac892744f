"""Strategies of hypothesis for the values that pass between the parts: `forests`, `scored_batches`, `reward_groups`, `branchings`.

The structure is drawn by hypothesis and can be reduced; tensors are filled from a drawn seed.
"""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("diffalign.testing.strategies needs hypothesis: pip install 'diffalign[testing]'") from error

from diffalign.core import ROOT, Condition, Progress, Prompt, ScoredBatch, Streams, TrajectoryBatch
from diffalign.samplers import Branching

from .doubles import embeddings

ETAS = st.sampled_from([0.2, 0.5, 0.7, 1.0])


@st.composite
def branchings(
    draw: st.DrawFn, max_steps: int = 6, max_leaves: int = 12, first: int = 0, stochastic: bool = True, comparable: bool = False
) -> Branching:
    """Draw branchings with a mixture of deterministic, stochastic and branching steps; the last step is deterministic.

    Args:
        draw: given by hypothesis
        max_steps: largest number T of denoising steps; the least is 3
        max_leaves: largest number of finished samples per prompt
        first: the first step that may be stochastic (FlowSDE is singular at sigma 1: 1)
        stochastic: whether at least one step must be
        comparable: whether there must be two leaves or more, and a stochastic step
    """
    steps = draw(st.integers(max(3, first + 2), max(max_steps, first + 2)))
    roots = draw(st.integers(1, 3))
    children, etas, leaves = [1] * steps, [0.0] * steps, roots
    for step in range(first, steps - 1):
        width = draw(st.integers(1, 3))
        if width > 1 and leaves * width <= max_leaves:
            children[step], etas[step], leaves = width, draw(ETAS), leaves * width
        elif roots > 1 or leaves > 1:  # a stochastic step with one child before the first branching of a single root is refused
            etas[step] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    if not any(etas) and (comparable or stochastic):
        step = draw(st.integers(first, steps - 2))
        children[step], etas[step] = 2 if comparable else draw(st.integers(1, 2)), draw(ETAS)
    return Branching(tuple(children), tuple(etas), roots)


@attrs.define
class _Node:
    prompt: int
    level: int
    parent: int  # place in depth-first order
    eta: float


def _grow(draw: st.DrawFn, nodes: list[_Node], top: int, last: int, room: list[int], noisy: bool) -> None:
    """Append the nodes below node `top`, depth first, with at most `room[0]` further branches; `noisy`: its edges have noise."""
    prompt, level = nodes[top].prompt, nodes[top].level
    if level == last:
        return
    eta = draw(st.sampled_from([0.5, 1.0] if noisy else [0.0, 0.5, 1.0])) if level + 1 < last else 0.0
    span = 1 if eta else draw(st.integers(1, last - level))
    children = draw(st.integers(1, 3)) if eta and room[0] >= 2 else 1
    room[0] -= children - 1
    for _ in range(children):
        nodes.append(_Node(prompt, level + span, top, eta))
        _grow(draw, nodes, len(nodes) - 1, last, room, noisy=False)


@st.composite
def forests(draw: st.DrawFn, max_prompts: int = 3, max_steps: int = 6, comparable: bool = False, min_steps: int = 3) -> TrajectoryBatch:
    """Draw irregular forests: branches of unequal depth, skipped levels, different widths, and two latent dimensions.

    They fit `TinyPolicy((2,))`, which can replay them. Latents, means and log-probabilities are random numbers that no policy drew, so a
    replay gives others.

    Args:
        draw: given by hypothesis
        max_prompts: largest number P of prompts; the least is 1
        max_steps: largest number T of steps
        comparable: whether every prompt has at least two leaves, and the forest a stochastic edge
        min_steps: least number of steps, at least 3. It goes before a smaller `max_steps`
    """
    prompts = draw(st.integers(1, max_prompts))
    last = draw(st.integers(max(3, min_steps), max(3, min_steps, max_steps)))
    nodes: list[_Node] = []
    for prompt in range(prompts):
        for _ in range(draw(st.integers(2 if comparable else 1, 3))):
            nodes.append(_Node(prompt, 0, ROOT, 0.0))
            _grow(draw, nodes, len(nodes) - 1, last, [4], noisy=comparable and len(nodes) == 1)
    order = sorted(range(len(nodes)), key=lambda place: nodes[place].level)  # stable: depth first within a level
    index = {place: position for position, place in enumerate(order)} | {ROOT: ROOT}
    ordered = [nodes[place] for place in order]
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    eta = torch.tensor([node.eta for node in ordered])
    log_prob = torch.randn(len(ordered), generator=noise, dtype=torch.float64) * (eta > 0)
    texts = tuple(Prompt(f"prompt {number}") for number in range(prompts))
    return TrajectoryBatch(
        condition=Condition(texts, ids=torch.arange(prompts), tensors={"embedding": embeddings(texts)}),
        sigmas=torch.linspace(1, 0, last + 1),
        latents=torch.randn(len(ordered), 2, generator=noise),
        level=torch.tensor([node.level for node in ordered]),
        parent=torch.tensor([index[node.parent] for node in ordered]),
        prompt=torch.tensor([node.prompt for node in ordered]),
        noise_level=eta,
        log_prob=log_prob,
        mean=torch.randn(int((eta > 0).sum()), 2, generator=noise),
    )


@st.composite
def reward_groups(draw: st.DrawFn, max_groups: int = 4, max_size: int = 6, bound: float = 50.0) -> tuple[Tensor, Tensor]:
    """Draw rewards [K], float64, and the group of each [K]: groups of unequal size whose members are scattered.

    Args:
        draw: given by hypothesis
        max_groups: largest number of groups; the least is 1
        max_size: largest number of members of a group; the least is 1
        bound: largest absolute reward
    """
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_groups))
    group = draw(st.permutations([index for index, size in enumerate(sizes) for _ in range(size)]))
    number = st.floats(-bound, bound, allow_nan=False, width=32)
    rewards = draw(st.lists(number, min_size=len(group), max_size=len(group)))
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(group)


@st.composite
def scored_batches(draw: st.DrawFn, trajectories: Callable[[], st.SearchStrategy[TrajectoryBatch]] | None = None) -> ScoredBatch:
    """Draw forests for objectives over stochastic trajectories, with rewards in [0, 1], raw scores of two parts, and progress.

    Args:
        draw: given by hypothesis
        trajectories: function that makes the strategy of the forests; by default comparable `forests` of 6 to 8 steps, whose grid has the
            four noise levels from sigma 0.5 on that objectives on noised ends draw by default
    """
    forest = draw(forests(comparable=True, min_steps=6, max_steps=8) if trajectories is None else trajectories())
    unit = st.floats(0, 1, width=32)
    parts = {name: torch.tensor(draw(st.lists(unit, min_size=len(forest.leaves), max_size=len(forest.leaves)))) for name in ("a", "b")}
    total = draw(st.integers(1, 1000))
    step = draw(st.integers(0, total - 1))
    return ScoredBatch(
        trajectories=forest,
        rewards=(parts["a"] + parts["b"]) / 2,
        parts=parts,
        groups=len(forest.condition),
        progress=Progress(step, total, draw(st.none() | unit)),
        streams=Streams(draw(st.integers(0, 2**32 - 1)), step),
    )
