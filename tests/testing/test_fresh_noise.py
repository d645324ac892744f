"""Noise that is drawn once and used twice: the contract of samplers finds it, though states and log-probs agree with each other."""

import re

import attrs
import pytest

from diffalign.core import Streams, TrajectorySampler
from diffalign.samplers import AdaptivePlan, ChainSampler, FixedPlan, RandomWindow, SlidingWindow, TreeSampler
from diffalign.testing.properties import examine
from diffalign.testing.sampler_contract import SAMPLER

LEVEL = 1 << 32
FRESH = [known for known in SAMPLER if known.name == "fresh noise"]
OTHERS = {"depth-first leaves", "prompts apart", "log-probs", "siblings differ"}
NEAR = [known for known in SAMPLER if known.name in {"fresh noise", *OTHERS}]


class Repeated(Streams):
    """Draws whose names leave something out."""

    lost = staticmethod(lambda prompts, nodes: (prompts, nodes))

    def normals(self, shape, name, prompt_ids, node_ids):
        return super().normals(shape, name, *self.lost(prompt_ids, node_ids))


class WithoutLevels(Repeated):
    lost = staticmethod(lambda prompts, nodes: (prompts, [node % LEVEL if node >= LEVEL else -1 - node for node in nodes]))


class FirstStatesAgain(Repeated):
    lost = staticmethod(lambda prompts, nodes: (prompts, [node - LEVEL if node // LEVEL == 1 else node for node in nodes]))


class PromptsShare(Repeated):
    """The first states are of each prompt, the steps' noise is of the node alone."""

    lost = staticmethod(lambda prompts, nodes: ([p if n < LEVEL else 0 for p, n in zip(prompts, nodes, strict=True)], nodes))


@attrs.frozen
class Reusing(TrajectorySampler):
    """A tree or chains whose noise is drawn by other names."""

    streams: type
    inner: TrajectorySampler

    def sample(self, policy, condition, progress, streams):
        return self.inner.sample(policy, condition, progress, self.streams(streams.seed, streams.step))


@pytest.mark.parametrize("inner", [TreeSampler(6, FixedPlan((1, 3))), ChainSampler(5, samples=3)], ids=["tree", "chains"])
@pytest.mark.parametrize("streams", [WithoutLevels, PromptsShare])
def test_noise_that_is_used_again_breaks_the_property_and_no_other(streams, inner):
    found = examine(Reusing(streams, inner), NEAR)
    assert [finding.name for finding in found if finding.failure] == ["fresh noise"]
    (failure,) = filter(None, (finding.failure for finding in found))
    assert re.search(r"node \d+ \(prompt \d, level \d\) and node \d+ .* have the same noise", failure)


def test_noise_of_a_first_state_that_a_step_uses_again_is_named():
    sampler = Reusing(FirstStatesAgain, TreeSampler(6, FixedPlan((0, 1), branches=2)))
    with pytest.raises(
        AssertionError, match=r"the first state \d+ \(prompt \d, level 0\) and node \d+ \(prompt \d, level 1\) have the same"
    ):
        FRESH[0].check(sampler)


@pytest.mark.parametrize(
    "sampler",
    [
        TreeSampler(8, AdaptivePlan(0.2, 0.9)),
        TreeSampler(8, RandomWindow()),
        TreeSampler(8, SlidingWindow()),
        TreeSampler(6, FixedPlan((1, 3)), rows=2),
        ChainSampler(5, samples=3),
    ],
    ids=str,
)
def test_samplers_of_the_package_have_fresh_noise(sampler):
    (finding,) = examine(sampler, FRESH)
    assert not finding.failure
    assert not finding.skipped
