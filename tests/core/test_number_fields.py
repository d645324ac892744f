"""Numbers of samplers, plans and objectives: what is none is refused by the name of its argument."""

import attrs
import numpy
import pytest

from diffalign.core.number_fields import finite, whole
from diffalign.objectives import CRD, DGPO, RAM, EffectiveSamples, ELBOPolicyGradient, FlowGRPO, GroupForwardKL, KLBudget, SoftmaxTB
from diffalign.objectives import DiffusionNFT as NFT
from diffalign.samplers import AdaptivePlan, ChainSampler, DeterministicSampler, FixedPlan, ProgressPlan, TreeSampler
from diffalign.testing import TinyPolicy

POLICY = TinyPolicy((2, 2))
NAN = float("nan")
BUDGET = KLBudget(10)
SHOWN = r"KLBudget\(nats=10, .*\)"
STEPS = "must be a list of whole numbers, denoising steps counted from 0; got"
ETA = r"\.eta must be a finite number of at least 0, or 3 of them, one per split; got"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TreeSampler(steps="4"), r"TreeSampler\.steps must be a whole number; got '4'"),
        (lambda: TreeSampler(steps=4.0), r"TreeSampler\.steps must be a whole number; got 4\.0"),
        (lambda: TreeSampler(rows=True), r"TreeSampler\.rows must be a whole number; got True"),
        (lambda: TreeSampler(plan=FixedPlan), r"TreeSampler\.plan must be a Plan; got the class FixedPlan itself; call it"),
        (lambda: DeterministicSampler(4, samples="3"), r"DeterministicSampler\.samples must be a whole number; got '3'"),
        (lambda: ChainSampler(samples=2.5), r"ChainSampler\.samples must be a whole number; got 2\.5"),
        (lambda: ChainSampler(eta="1"), r"ChainSampler\.eta must be a finite number; got '1'"),
        (lambda: ChainSampler(eta=NAN), r"ChainSampler\.eta must be a finite number; got nan"),
        (lambda: ChainSampler(window=3), rf"ChainSampler\.window {STEPS} 3"),
        (lambda: FixedPlan(splits=1), rf"FixedPlan\.splits {STEPS} 1"),
        (lambda: FixedPlan(splits="12"), rf"FixedPlan\.splits {STEPS} '12'"),
        (lambda: FixedPlan(splits=(1.5, 2)), rf"FixedPlan\.splits {STEPS} \(1\.5, 2\)"),
        (lambda: FixedPlan(branches="3"), r"FixedPlan\.branches must be a whole number; got '3'"),
        (lambda: FixedPlan(eta="0.7"), rf"FixedPlan{ETA} '0\.7'"),
        (lambda: FixedPlan(eta=-1), rf"FixedPlan{ETA} -1"),
        (lambda: FixedPlan(eta=NAN), rf"FixedPlan{ETA} nan"),
        (lambda: FixedPlan(eta=(0.5, "a", 1)), rf"FixedPlan{ETA} \(0\.5, 'a', 1\)"),
        (lambda: ProgressPlan(eta=-1), rf"ProgressPlan{ETA} -1"),
        (lambda: AdaptivePlan(0, 1, eta="0.7"), rf"AdaptivePlan{ETA} '0\.7'"),
        (lambda: KLBudget(nats="10"), r"KLBudget\.nats must be a number; got '10'"),
        (lambda: EffectiveSamples("0.5"), r"EffectiveSamples\.share must be a number; got '0\.5'"),
        (lambda: SoftmaxTB(POLICY, beta="20"), r"SoftmaxTB\.beta must be a number, a schedule or a budget; got '20'"),
        (lambda: GroupForwardKL(POLICY, beta=True), r"GroupForwardKL\.beta must be a number, a schedule or a budget; got True"),
        (lambda: SoftmaxTB(POLICY, reference_weight="1"), r"SoftmaxTB\.reference_weight must be a number; got '1'"),
        (lambda: DGPO(POLICY, beta=BUDGET), rf"DGPO\.beta must be a finite number; got {SHOWN}"),
        (lambda: DGPO(POLICY, kl="1"), r"DGPO\.kl must be a finite number; got '1'"),
        (lambda: CRD(POLICY, beta=BUDGET), rf"CRD\.beta must be a finite number; got {SHOWN}"),
        (lambda: NFT(POLICY, beta=BUDGET), rf"DiffusionNFT\.beta must be a finite number; got {SHOWN}"),
        (lambda: RAM(POLICY, beta=BUDGET), rf"RAM\.beta must be a finite number; got {SHOWN}"),
        (lambda: ELBOPolicyGradient(POLICY, kl=BUDGET), rf"ELBOPolicyGradient\.kl must be a finite number; got {SHOWN}"),
        (lambda: FlowGRPO(POLICY, kl=BUDGET), rf"FlowGRPO\.kl must be a number; got {SHOWN}"),
        (lambda: SoftmaxTB(None), "policy must be a Policy; got NoneType"),
        (lambda: SoftmaxTB(None, measure="path"), "policy must be a Policy; got NoneType"),
        (lambda: DGPO(TinyPolicy), "policy must be a Policy; got the class TinyPolicy itself; call it"),
        (lambda: NFT(None), "policy must be a Policy; got NoneType"),
        (lambda: SoftmaxTB(POLICY, reference=3), "reference must be a Policy; got int"),
    ],
)
def test_a_wrong_type_is_refused_by_its_name(build, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build()


def test_numbers_of_numpy_are_numbers():
    assert TreeSampler(numpy.int64(6)).steps == 6
    assert FixedPlan(splits=tuple(numpy.arange(1, 3)), eta=numpy.float32(0.5)).draw(6, None, None).leaves == 9
    assert KLBudget(numpy.float64(3)).nats == 3


def test_a_range_is_still_that_of_attrs():
    @attrs.frozen
    class Part:
        count: int = attrs.field(default=2, validator=whole(2))
        share: float = attrs.field(default=1.0, validator=finite(attrs.validators.gt(0)))

    with pytest.raises(ValueError, match=r"^'count' must be >= 2: 1"):
        Part(1)
    with pytest.raises(ValueError, match=r"^'share' must be > 0: 0"):
        Part(2, 0)
    with pytest.raises(ValueError, match=r"^Part\.share must be a finite number; got inf$"):
        Part(2, float("inf"))
