"""Objectives and samplers that the study of handwriting compares, each at several strengths of what holds the policy."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from diffalign.core import Objective, Policy, TrajectorySampler
from diffalign.objectives import (
    AWM,
    CRD,
    DGPO,
    ELBO,
    RAM,
    DiffusionNFT,
    ELBOGroupForwardKL,
    ELBOPolicyGradient,
    ELBOSoftmaxTB,
    FlowGRPO,
    GroupForwardKL,
    SoftmaxTB,
)
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, Midpoint, TreeSampler

TREE = TreeSampler(8, FixedPlan((1, 2, 3), branches=3, eta=0.7))
ENDS = DeterministicSampler(8, samples=27)
CHAINS = ChainSampler(8, samples=27, eta=0.7, window=(1, 4))
FEW_CHAINS = ChainSampler(8, samples=10, eta=0.7, window=(1, 4))
"""As many network rows in a rollout and an update as TREE has with 27 leaves."""
SOLVED = DeterministicSampler(4, samples=27, solver=Midpoint())
"""As many network evaluations as ENDS."""


@attrs.frozen
class Arm:
    """How a run of the study samples and learns.

    Args:
        make: objective of a policy and a temperature
        sampler: of the rollouts
        measured: sampler of the measures: its samples follow the same law of steps, from initial noises that all arms share
        density: convention of the kernel's log-density
    """

    make: Callable[[Policy, float], Objective]
    sampler: TrajectorySampler = TREE
    measured: TrajectorySampler = TREE
    density: Any = "mean"

    @property
    def on_ends(self) -> bool:
        """Whether the arm samples deterministic ends, whose law has no path."""
        return self.measured is not TREE


def ends(make: Callable[[Policy, float], Objective], sampler: TrajectorySampler = ENDS) -> Arm:
    return Arm(make, sampler, sampler)


def unscaled(policy: Policy, beta: float) -> FlowGRPO:
    """Flow-GRPO with the optimum of Softmax-TB: rewards are not standardised, and the KL weighs 1 / beta."""
    return FlowGRPO(policy, kl=1 / beta, standardize=False)


def bounded(kind: type[ELBOSoftmaxTB] | type[ELBOGroupForwardKL], **bound: Any) -> Callable[[Policy, float], Objective]:
    """Trajectory balance on the bound, with settings of the bound."""
    return lambda policy, beta: kind(policy, beta=beta, bound=ELBO(**bound))


ARMS: Mapping[str, Arm] = {
    "softmax-tb": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta)),
    "softmax-tb, level weights": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta, level_weights=True)),
    "softmax-tb, squared": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta, loss="squared")),
    "softmax-tb, no trust region": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta, clip=None)),
    "softmax-tb, not centred": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta, center="none")),
    "softmax-tb, without reference": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta, measure="path")),
    "softmax-tb of the release": Arm(lambda policy, beta: SoftmaxTB.release_compatible(policy), density="squared"),
    "softmax-tb, 27 chains": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta), CHAINS),
    "softmax-tb, 10 chains": Arm(lambda policy, beta: SoftmaxTB(policy, beta=beta), FEW_CHAINS),
    "group forward kl": Arm(lambda policy, beta: GroupForwardKL(policy, beta=beta)),
    "flow-grpo": Arm(lambda policy, beta: FlowGRPO(policy, kl=0.0)),
    **{f"flow-grpo, kl {kl}": Arm(lambda policy, beta, kl=kl: FlowGRPO(policy, kl=kl)) for kl in (0.3, 0.1, 0.03)},
    "flow-grpo, not standardised, kl 1 / beta": Arm(unscaled),
    "flow-grpo, not standardised, kl 1 / 2 beta": Arm(lambda policy, beta: unscaled(policy, 2 * beta)),
    "flow-grpo, not standardised, kl 1 / 4 beta": Arm(lambda policy, beta: unscaled(policy, 4 * beta)),
    "flow-grpo, not standardised, kl 1 / beta, 27 chains": Arm(unscaled, CHAINS),
    "flow-grpo, not standardised, kl 1 / beta, 10 chains": Arm(unscaled, FEW_CHAINS),
    "flow-grpo, log-ratio in the reward": Arm(lambda policy, beta: FlowGRPO(policy, kl=1 / beta, kl_in="reward", standardize=False)),
    "diffusion-nft": ends(lambda policy, beta: DiffusionNFT(policy)),
    **{f"diffusion-nft, kl {kl}": ends(lambda policy, beta, kl=kl: DiffusionNFT(policy, kl=kl)) for kl in (0.03, 0.1, 1.0)},
    "dgpo": ends(lambda policy, beta: DGPO(policy)),
    **{f"dgpo, kl {kl}": ends(lambda policy, beta, kl=kl: DGPO(policy, kl=kl)) for kl in (0.005, 0.02, 0.1)},
    "awm": ends(lambda policy, beta: AWM(policy)),
    **{f"awm, kl {kl}": ends(lambda policy, beta, kl=kl: AWM(policy, kl=kl)) for kl in (0.03, 0.1, 1.0)},
    "crd": ends(lambda policy, beta: CRD(policy)),
    **{f"crd, kl {kl}": ends(lambda policy, beta, kl=kl: CRD(policy, kl=kl)) for kl in (0.3, 1.0)},
    "ram": ends(lambda policy, beta: RAM(policy, beta=beta)),
    "ram, beta 5.0": ends(lambda policy, beta: RAM(policy, beta=5.0)),
    **{f"elbo softmax-tb, sigma from {least}": ends(bounded(ELBOSoftmaxTB, sigma_min=least)) for least in (0.05, 0.3)},
    "elbo softmax-tb, flow weighting": ends(bounded(ELBOSoftmaxTB, sigma_min=0.05, weighting="flow")),
    "elbo softmax-tb, 4 midpoint steps": ends(bounded(ELBOSoftmaxTB, sigma_min=0.3), SOLVED),
    **{
        f"elbo policy gradient, sigma from {least}": ends(
            lambda policy, beta, least=least: ELBOPolicyGradient(policy, kl=1 / beta, bound=ELBO(sigma_min=least))
        )
        for least in (0.05, 0.3)
    },
    "elbo group forward kl, sigma from 0.3": ends(bounded(ELBOGroupForwardKL, sigma_min=0.3)),
}
