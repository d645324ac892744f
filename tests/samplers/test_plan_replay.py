"""Rollout and replay agree under every plan, promoted roots and partial levels included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.core import CPS, ContractError, Edges, FlowSDE, Progress, Streams, check_first_step, replay_log_prob
from diffalign.samplers import AdaptivePlan, FixedPlan, ProgressPlan, TreeSampler
from diffalign.testing import BrokenReplay, TinyPolicy

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]

PLANS = {
    "fixed": FixedPlan((2, 3, 4)),
    "promoted": FixedPlan((1, 3, 4), promote_roots=True),
    "promoted at 0": FixedPlan((0, 2, 4), promote_roots=True),
    "partial": FixedPlan((1, 2, 4), levels=1),
    "capped": FixedPlan((2, 3, 4), max_leaves=9),
    "several roots": FixedPlan((2, 4), branches=2, roots=2),
    "progress": ProgressPlan((1, 2, 3), (1, 3, 4)),
    "progress, promoted": ProgressPlan((1, 2, 3), (1, 3, 4), promote_roots=True),
    "adaptive": AdaptivePlan(0.0, 1.0),
    "adaptive, promoted": AdaptivePlan(0.0, 1.0, promote_roots=True, first=0),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@given(st.integers(0, 99), st.none() | st.floats(0, 1))
@settings(max_examples=6)
def test_replay_repeats_the_rollout_of_every_plan(plan, step, reward):
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    sampler, progress, streams = TreeSampler(6, plan), Progress(step, 100, reward), Streams(3, step)
    with torch.no_grad():
        forest = sampler.sample(policy, policy.encode(PROMPTS), progress, streams)
        branching = plan.draw(6, progress, streams)
        assert len(forest.leaves) == 2 * branching.leaves
        edges = Edges.of(forest)
        assert len(edges.parent) == 2 * branching.replay_rows
        assert check_first_step(policy, forest).deviation == 0.0
        log_prob = replay_log_prob(policy, forest, edges)
    torch.testing.assert_close(log_prob, forest.log_prob[edges.child], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()], ids=["CPS", "FlowSDE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_first_step_contract_holds_under_every_plan(plan, kernel, dtype):
    policy = TinyPolicy((2, 2), kernel=kernel, dtype=dtype)
    for rows in (1, 3, None):
        for progress in (Progress(0, 9), Progress(8, 9, 0.9)):
            with torch.no_grad():
                forest = TreeSampler(6, plan, rows).sample(policy, policy.encode(PROMPTS), progress, Streams(3, progress.step))
            found = check_first_step(policy, forest)
            assert found.deviation == 0.0
            assert found.rows == len(Edges.of(forest).parent)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_replay_that_slips_one_index_is_noticed_under_every_plan(plan):
    policy = BrokenReplay(TinyPolicy((2, 2), dtype=torch.float64), "sigma", 6)
    with torch.no_grad():
        forest = TreeSampler(6, plan).sample(policy, policy.encode(PROMPTS), Progress(3, 9), Streams(3, 3))
    with pytest.raises(ContractError, match=r"At level \d \(sigma .* one index off"):
        check_first_step(policy, forest, rows=4)
