"""The student that ships: it fits the base that ships, is small, and is better in four steps than the base."""

import pytest
import torch

from diffalign import config
from diffalign.config.blueprint import build
from diffalign.core import CheckpointError, Progress, Streams
from diffalign.embedded import SHAPEWORLD
from diffalign.policies import FlowMatchingPolicy, TDMPolicy
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler
from diffalign.shapeworld import CompositionalReward

PROMPTS = read_prompts("shapeworld/count-held-out")[:4] + read_prompts("shapeworld/relation-held-out")[:4]


def base(*changes):
    """The policy that the run file puts behind the student."""
    policy = build(config.parse("shapeworld_tdm_r1", changes).tree["policy"].arguments["policy"], {})
    assert isinstance(policy, FlowMatchingPolicy)
    return policy


@torch.no_grad()
def mean_reward(policy):
    forest = DeterministicSampler(4, samples=3).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(11))
    texts = [PROMPTS[index] for index in forest.group.tolist()]
    return float(CompositionalReward()(policy.decode(forest.samples), texts).mean())


def test_it_is_better_in_four_steps_than_its_base():
    student = TDMPolicy.from_saved(base(), "shapeworld", steps=4)
    assert mean_reward(student) > mean_reward(student.fork(pristine=True)) + 0.05


def test_it_is_small_and_has_a_card():
    files = list((SHAPEWORLD / "student").iterdir())
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert {"README.md", "student.json", "student.safetensors"} <= {file.name for file in files}


def test_it_needs_its_own_adapters_and_steps():
    with pytest.raises(CheckpointError, match=r"Build the policy with the adapters of the student"):
        TDMPolicy.from_saved(base("--policy.policy.lora.rank=8"), "shapeworld")
    with pytest.raises(CheckpointError, match=r"must have steps = 2, as asked; it was made with 4"):
        TDMPolicy.from_saved(base(), "shapeworld", steps=2)
