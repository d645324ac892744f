"""Objectives."""

from .awm import AWM
from .crd import CRD
from .dgpo import DGPO
from .diffusion_nft import DiffusionNFT
from .direct_reinforcement import DirectReinforcement
from .draws import Draws, GridDraws
from .elbo import ELBO
from .elbo_group_forward_kl import ELBOGroupForwardKL
from .elbo_policy_gradient import ELBOPolicyGradient
from .elbo_softmax_tb import ELBOSoftmaxTB
from .flow_grpo import FlowGRPO
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .group_forward_kl import GroupForwardKL
from .guarded import NormGuarded
from .guards import KLMask, NormGuard
from .noised import Noised, NoisedSamples
from .on_policy_distillation import OnPolicyDistillation
from .ram import RAM
from .ratio import Ratio, RatioNorm
from .softmax_tb import SoftmaxTB
from .surrogate_reward import SurrogateReward
from .tdm import TrajectoryDistributionMatching
from .temperature import Budget, EffectiveSamples, KLBudget

# For users, who compose a run, run it and look at it.
__all__ = [
    "AWM",
    "CRD",
    "DGPO",
    "ELBO",
    "RAM",
    "DiffusionNFT",
    "DirectReinforcement",
    "ELBOGroupForwardKL",
    "ELBOPolicyGradient",
    "ELBOSoftmaxTB",
    "EffectiveSamples",
    "FlowGRPO",
    "GroupForwardKL",
    "KLBudget",
    "KLMask",
    "NormGuard",
    "NormGuarded",
    "OnPolicyDistillation",
    "Ratio",
    "RatioNorm",
    "SoftmaxTB",
    "SurrogateReward",
    "TrajectoryDistributionMatching",
]

# For authors, who write a temperature, or an objective on noised ends.
__all__ += ["Budget", "Draws", "ForwardBatch", "ForwardLosses", "ForwardObjective", "GridDraws", "Noised", "NoisedSamples"]
