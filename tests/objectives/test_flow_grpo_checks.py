"""Flow-GRPO: what it reports, what it refuses, and two steps in closed form."""

import math

import pytest
import torch
from chosen import assert_two_steps_on_a_ring, batch_for
from ring import MODES, rewarded
from tiny import batch_of, gradient, pair

from diffalign.core import CPS, NonFiniteError
from diffalign.objectives import FlowGRPO
from diffalign.samplers import Branching, ChainSampler, FixedPlan, ProgressPlan, TreeSampler
from diffalign.testing import TinyPolicy


def test_metrics_say_what_happened():
    policy, reference = pair()
    batch = batch_of(policy)
    (phase,) = FlowGRPO(policy, reference, kl=0.3).phases()
    (loss,) = phase.losses(batch, 0)
    means = {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
    assert means["loss"] == pytest.approx(float(loss.value.detach()))
    assert means["loss"] == pytest.approx(0.3 * means["kl"] / 4, abs=1e-9)  # on policy the surrogate is -mean A = 0; 4 dimensions, in nats
    assert means["kl"] > 0
    assert means["ratio/mean"] == pytest.approx(1.0)
    assert means["ratio/clipped"] == 0
    assert means["advantage/std"] == pytest.approx(math.sqrt(18 / 17))
    (phase,) = FlowGRPO(policy, kl=0.0).phases()
    (loss,) = phase.losses(batch, 0)
    assert not {"kl", "log_ratio/reference"} & loss.metrics.keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda policy: FlowGRPO(policy, kl=-0.1), "FlowGRPO.kl must be at least 0 and finite: it is the weight of a penalty; got -0.1"),
        (lambda policy: FlowGRPO(policy, kl=math.nan), "FlowGRPO.kl must be at least 0 and finite"),
        (lambda policy: FlowGRPO(policy, policy.fork(), kl=0.0), r"FlowGRPO\.reference has no use if FlowGRPO\.kl is 0"),
        (lambda policy: FlowGRPO(policy, policy.fork(trainable=True)), "reference must be frozen: 2 parameters require grad"),
        (lambda policy: FlowGRPO(policy, policy), "reference must be frozen"),
        (lambda policy: FlowGRPO(policy, clip=0.0), "clip"),
        (
            lambda policy: FlowGRPO(policy, standardize=False, deviation="batch"),
            r"FlowGRPO\.deviation has no use if FlowGRPO\.standardize is false, .*; got 'batch'\. Leave it out",
        ),
        (lambda policy: FlowGRPO(policy, updates=0), "updates"),
        (lambda policy: FlowGRPO(policy, rows=0), "rows"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(TinyPolicy())


def test_several_updates_of_a_true_density_need_a_normalised_ratio():
    policy = TinyPolicy(kernel=CPS("sum"))
    with pytest.raises(ValueError, match=r"FlowGRPO\.updates must be 1 if the kernel's log-density is a 'sum'; got 2"):
        FlowGRPO(policy, updates=2)
    assert FlowGRPO(policy, updates=2, ratio_norm=True).updates == 2


@pytest.mark.parametrize(
    ("branching", "message"),
    [
        (Branching((1, 1), (0.0, 0.0), roots=3), "FlowGRPO needs stochastic steps, but every edge of this batch is deterministic"),
        (Branching((1, 1), (0.7, 0.0)), "FlowGRPO needs at least 2 samples per prompt to compare; prompt 'a red cube' has 1"),
    ],
)
def test_a_batch_that_teaches_nothing_is_refused(branching, message):
    policy, _ = pair()
    with pytest.raises(ValueError, match=message):
        gradient(FlowGRPO(policy), batch_for(policy, branching))


def test_log_probs_that_are_not_finite_are_an_error_with_an_address():
    policy, reference = pair()
    batch = batch_of(policy)
    with torch.no_grad():
        reference.network.lora_B.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"the log-prob under the reference is nan at level 2 .*Nothing was updated"):
        gradient(FlowGRPO(policy, reference), batch)
    with torch.no_grad():
        policy.network.lora_B.weight.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="the log-prob under the trained weights is"):
        gradient(FlowGRPO(policy, kl=0.0), batch)


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({}, ChainSampler(6, samples=6)),
        ({"kl": 0.1, "kl_in": "reward"}, ChainSampler(6, samples=6, window=(1, 3))),
        ({"kl": 0.0}, TreeSampler(6, FixedPlan((1, 2)))),
        ({"kl": 0.1, "updates": 2, "ratio_norm": True, "rows": 3}, TreeSampler(6, ProgressPlan((1, 2, 3), (1, 3, 4), branches=2))),
    ],
    ids=["chains", "window, reward", "tree", "tree, two updates"],
)
def test_two_steps_on_a_ring(options, sampler):
    assert_two_steps_on_a_ring(lambda policy: FlowGRPO(policy, **options), sampler, MODES, rewarded)
