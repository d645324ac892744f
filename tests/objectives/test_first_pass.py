"""First update of a batch in pieces: the rollout's own transitions serve where rounding allows, and no row is evaluated for them."""

import pytest
import torch

from diffalign import AlignmentLoop
from diffalign.core import CPS, FlowSDE, Progress
from diffalign.objectives import FlowGRPO, GroupForwardKL, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

PARENTS = 2 * (1 + 3)
"""Rows of an update: the branching nodes of two prompts."""

OBJECTIVES = {
    "tmpo": lambda policy, rows: SoftmaxTB(policy, rows=rows),
    "release": lambda policy, rows: SoftmaxTB.release_compatible(policy, rows=rows),
    "grpo": lambda policy, rows: FlowGRPO(policy, kl=0.1, rows=rows),
    "grpo, two updates": lambda policy, rows: FlowGRPO(policy, kl=0.1, rows=rows, updates=2),
    "forward": lambda policy, rows: GroupForwardKL(policy, rows=rows),
}


def steps(name, rows, kernel, dtype=torch.float32):
    policy = TinyPolicy(latent_shape=(3, 2, 2), kernel=kernel, dtype=dtype)
    loop = AlignmentLoop(
        OBJECTIVES[name](policy, rows), TreeSampler(5, FixedPlan(splits=(1, 2))), channel_reward, Prompts(["a", "b"]), prompts_per_step=2
    )
    reports = [loop.step(loop.prompts.draw(step, 2), Progress(step, 2)) for step in range(2)]
    return reports[-1], {name: parameter.detach() for name, parameter in policy.trainable_parameters().items()}


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()], ids=["CPS", "FlowSDE"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_pieces_evaluate_each_row_once_and_move_the_weights_alike(name, kernel):
    whole, expected = steps(name, None, kernel)
    pieces, moved = steps(name, 3, kernel)
    later = PARENTS * (name == "grpo, two updates")  # later updates weigh their pieces anew
    assert whole.ledger.rows["policy/update"] == PARENTS + later
    assert pieces.ledger.rows["policy/update"] == PARENTS + 2 * later
    assert pieces.ledger.tracked["policy/update"] == PARENTS + later
    for key, weight in moved.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-6)
    for key in ("loss", "grad_norm/policy"):
        assert pieces.metrics[key] == pytest.approx(whole.metrics[key], rel=1e-3, abs=1e-6)


def test_in_half_precision_a_call_of_another_size_rounds_too_much():
    report, _ = steps("grpo", 3, CPS(), torch.bfloat16)
    assert report.ledger.rows["policy/update"] == 2 * PARENTS
    assert report.ledger.tracked["policy/update"] == PARENTS


def test_nor_does_a_summed_density_take_them():
    report, _ = steps("grpo", 3, FlowSDE("sum"))
    assert report.ledger.rows["policy/update"] == 2 * PARENTS
