"""The first-step contract over kernels, precisions, row budgets and plans."""

import pytest
import torch

from diffalign import Progress, Prompt, Streams
from diffalign.core import CPS, ContractError, FlowSDE, first_step_deviation
from diffalign.core.contract import TOLERANCE
from diffalign.samplers import AdaptivePlan, ChainSampler, FixedPlan, ProgressPlan, TreeSampler
from diffalign.testing import SlippedReplay, TinyPolicy

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]
PLANS = {
    "fixed": FixedPlan((2, 3, 5)),
    "promoted": FixedPlan((1, 3, 5), promote_roots=True),
    "partial levels": FixedPlan((1, 3, 5), levels=2),
    "several roots": FixedPlan((2, 4), branches=2, roots=3),
    "progress": ProgressPlan(early=(1, 2, 3), late=(2, 4, 6), concentration=6.0),
    "adaptive": AdaptivePlan(low=0.2, high=0.6),
}


def samplers(rows):
    plans = [pytest.param(TreeSampler(10, plan, rows=rows), id=name) for name, plan in PLANS.items()]
    return [*plans, pytest.param(ChainSampler(10, samples=4, rows=rows), id="chain")]


def forest_of(policy, sampler):
    with torch.no_grad():
        return sampler.sample(policy, policy.encode(PROMPTS), Progress(4, 9, 0.3), Streams(1, 4))


@pytest.mark.parametrize("sampler", [case for rows in (1, 3, None) for case in samplers(rows)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [CPS("mean"), FlowSDE("mean")], ids=repr)
def test_replay_reproduces_the_rollout(kernel, dtype, sampler):
    policy = TinyPolicy((2, 2), kernel=kernel, dtype=dtype)
    forest = forest_of(policy, sampler)
    first_step_deviation(policy, forest, parents=10_000, tolerance=TOLERANCE[policy.precision])


@pytest.mark.parametrize("sampler", samplers(None))
@pytest.mark.parametrize("kernel", [CPS("mean"), FlowSDE("mean")], ids=repr)
def test_a_slip_of_one_sigma_index_is_found_and_named(kernel, sampler):
    policy = SlippedReplay(TinyPolicy((2, 2), kernel=kernel), steps=10)
    forest = forest_of(policy, sampler)
    with pytest.raises(ContractError, match=r"at level \d+ \(sigma"):
        first_step_deviation(policy, forest, parents=10_000, tolerance=TOLERANCE[torch.float32])
