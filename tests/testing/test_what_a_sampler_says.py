"""What a sampler says beforehand and about its network calls is compared with what it draws."""

import attrs
import pytest
import torch

from diffalign.core import Outline, TrajectorySampler
from diffalign.samplers import (
    AdaptivePlan,
    Branching,
    ChainSampler,
    DeterministicSampler,
    DrawnSteps,
    FixedPlan,
    Heun,
    ProgressPlan,
    RandomWindow,
    SlidingWindow,
    TreeSampler,
    foreseen,
)
from diffalign.testing import check_sampler
from diffalign.testing.properties import examine
from diffalign.testing.sampler_contract import SAMPLER

MINE = ("outline", "branching", "network calls")
TREE = TreeSampler(6, FixedPlan((1, 3)))
PACKAGE = {
    "tree in pieces": TreeSampler(6, FixedPlan((1, 3)), rows=4),
    "tree with its graph": TreeSampler(6, FixedPlan((1, 3)), keep_graph=True),
    "tree of several roots": TreeSampler(8, FixedPlan((0, 2, 4), roots=2, max_leaves=6, eta=(0.3, 0.5, 0.9))),
    "promoted roots": TreeSampler(8, ProgressPlan(promote_roots=True)),
    "a reward that decides": TreeSampler(8, AdaptivePlan(0.2, 0.8, eta_factors=(1.3, 0.8), promote_roots=True)),
    "a reward that decides the noise alone": TreeSampler(5, AdaptivePlan(0.0, 1.0, eta_factors=(1.3, 0.8))),
    "sliding window": TreeSampler(8, SlidingWindow(width=2, every=2)),
    "random window": TreeSampler(8, RandomWindow(width=2, shared_noise=False)),
    "chain": ChainSampler(5, 3, rows=4),
    "deterministic": DeterministicSampler(4, samples=3, rows=2),
    "solver": DeterministicSampler(4, samples=2, solver=Heun()),
    "drawn steps": DrawnSteps((1, 2, 4), samples=2, rows=1),
}


def findings(sampler):
    return {found.name: found for found in examine(sampler, [known for known in SAMPLER if known.name in MINE])}


@pytest.mark.parametrize("name", PACKAGE)
def test_the_samplers_of_the_package_say_what_they_draw(name):
    found = findings(PACKAGE[name])
    assert not [str(one) for one in found.values() if one.failure]
    assert {one.name for one in found.values() if one.skipped} <= {"network calls"}


@attrs.frozen
class Says(TrajectorySampler):
    """Draws what `inner` draws, and says something else."""

    outlined: dict = attrs.field(factory=dict)
    branched: Branching | None = None
    number: object = None
    inner: TrajectorySampler = TREE

    def outline(self, policy):
        right = foreseen(policy, self.inner.branching())
        return Outline(**{"samples": right.samples, "noise_levels": right.noise_levels, "sigmas": right.sigmas, **self.outlined})

    def branching(self):
        return self.inner.branching() if self.branched is None else self.branched

    def sample(self, policy, condition, progress, streams):
        forest = self.inner.sample(policy, condition, progress, streams)
        return forest if self.number is None else attrs.evolve(forest, call=self.number(forest.call))


def test_a_sampler_that_says_what_it_draws_holds():
    assert not [found for found in check_sampler(Says()) if found.skipped]


@pytest.mark.parametrize(
    ("said", "broken", "words"),
    [
        ({"outlined": {"samples": 99}}, "outline", "says 99 samples of a prompt, and 9 were drawn"),
        ({"outlined": {"noise_levels": (0.0,) * 6}}, "outline", "says that none of the steps are stochastic, and some of those drawn are"),
        ({"outlined": {"noise_levels": (0.0, 0.3, 0.0, 0.7, 0.0, 0.0)}}, "outline", "says eta 0.3 for step 1; drawn was 0.7"),
        ({"outlined": {"noise_levels": (0.0, 0.7, 0.0, 0.7)}}, "outline", "says 4 steps, and 6 were drawn"),
        ({"outlined": {"sigmas": torch.linspace(1, 0, 7)}}, "outline", "the sigmas of outline(policy) must be those of the forest"),
        ({"outlined": {"sigmas": torch.linspace(1, 0, 4)}}, "outline", "must have the 7 sigmas of the forest; it has 4"),
        ({"branched": TreeSampler(6, FixedPlan((1, 3), branches=2)).branching()}, "branching", "says 4 samples of a prompt, and 9"),
        ({"branched": TreeSampler(6, FixedPlan((1, 3), eta=0.5)).branching()}, "branching", "says eta 0.5 for step 1; drawn was 0.7"),
        ({"branched": DeterministicSampler(6, 9).branching()}, "branching", "says that none of the steps are stochastic"),
        (
            {"branched": Branching((1,) * 6, (0.0, 0.7, 0.0, 0.7, 0.0, 0.0), roots=9)},
            "branching",
            "says 9 roots of a prompt, and 1 were drawn",
        ),
        ({"number": lambda call: torch.where(call >= 0, 1, call)}, "network calls", "call 1 must have had the 12 parents of its edges"),
        ({"number": lambda call: torch.arange(len(call))}, "network calls", "must have had the 1 parents of its edges as its rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sampler_that_says_something_else_is_found(said, broken, words):
    found = findings(Says(**said))
    assert {one.name for one in found.values() if one.failure} == {broken}
    assert words in found[broken].failure


def test_steps_that_differ_have_the_branching_that_needs_the_most():
    assert "says 2 steps, fewer than the 4" in findings(Shorter())["branching"].failure


@attrs.frozen
class Grids(TrajectorySampler):
    """Draws one of three numbers of steps, and says some of their grids."""

    said: tuple = (1, 2, 4)

    def outline(self, policy):
        first, *others = (foreseen(policy, DeterministicSampler(count, 2).branching()) for count in self.said)
        return attrs.evolve(first, others=tuple(other.sigmas for other in others))

    def sample(self, policy, condition, progress, streams):
        return DrawnSteps((1, 2, 4), samples=2).sample(policy, condition, progress, streams)


def test_every_drawn_grid_is_one_that_was_said():
    assert not findings(Grids())["outline"].failure
    assert not findings(Grids((4, 1, 2)))["outline"].failure
    for said, lacking in (((1, 2), "1, 0.8571, 0.6667, 0.4, 0"), ((4, 2), "1, 0"), ((1, 3, 4), "1, 0.6667, 0")):
        failure = findings(Grids(said))["outline"].failure
        assert f"has the sigmas {lacking}, which are no grid of outline(policy); give it in `Outline.others`" in failure


class Shorter(TrajectorySampler):
    """Says the branching of its shortest step."""

    def branching(self):
        return DeterministicSampler(2, samples=2).branching()

    def sample(self, policy, condition, progress, streams):
        return DrawnSteps((2, 4), samples=2).sample(policy, condition, progress, streams)


def test_what_is_not_known_is_skipped():
    assert findings(Plain())["outline"].skipped == "it has no outline, so nothing is known before it draws"
    assert findings(Plain())["branching"].skipped == "it has no branching(), so nothing is forecast"
    unnumbered = Says(number=lambda call: torch.full_like(call, -1))
    assert findings(unnumbered)["network calls"].skipped.startswith("it does not number its network calls")


class Plain(TrajectorySampler):
    def sample(self, policy, condition, progress, streams):
        return TREE.sample(policy, condition, progress, streams)
