"""Objectives."""

from .dgpo import DGPO
from .diffusion_nft import DiffusionNFT
from .direct_reinforcement import DirectReinforcement
from .flow_grpo import FlowGRPO
from .group_forward_kl import GroupForwardKL
from .ratio import Ratio, RatioNorm
from .softmax_tb import SoftmaxTB
from .surrogate_reward import SurrogateReward
from .tdm import TrajectoryDistributionMatching
from .temperature import Budget, EffectiveSamples, KLBudget

# For users, who compose a run, run it and look at it.
__all__ = [
    "DGPO",
    "DiffusionNFT",
    "DirectReinforcement",
    "EffectiveSamples",
    "FlowGRPO",
    "GroupForwardKL",
    "KLBudget",
    "Ratio",
    "RatioNorm",
    "SoftmaxTB",
    "SurrogateReward",
    "TrajectoryDistributionMatching",
]

# For authors, who write a temperature.
__all__ += ["Budget"]
