"""The parts whose contracts the study of mutations runs, where a class alone is not enough: `pytest --diffalign MODULE:tree`."""

from diffalign.core import Guided, Policy, TrajectorySampler
from diffalign.objectives import SurrogateReward, TrajectoryDistributionMatching
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy


def tree() -> TrajectorySampler:
    return TreeSampler(6, FixedPlan((1, 3)), rows=4)


def chain() -> TrajectorySampler:
    return ChainSampler(5, samples=3)


def network() -> Policy:
    return TinyPolicy((2, 2))


def guided() -> Policy:
    return Guided(TinyPolicy((2, 2)), 3.0)


def surrogate(policy: Policy) -> SurrogateReward:
    return SurrogateReward(policy, teacher=policy.fork())


def distillation(policy: Policy) -> TrajectoryDistributionMatching:
    """Its rewards only watch, so the property "learns" is not asked of it."""
    return TrajectoryDistributionMatching(policy, teacher=policy.fork())
