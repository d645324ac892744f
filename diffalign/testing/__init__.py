"""Tests for authors of new parts: contracts, small doubles in closed form, and (in `strategies`) hypothesis strategies."""

from .broken import BrokenReplay
from .doubles import ConstantReward, GivenPlan, TinyPolicy, channel_reward
from .elsewhere import prepare_second_device
from .objective_contract import check_objective
from .policy_contract import check_policy
from .pretended_device import second_device
from .properties import Finding, Property, PropertyError
from .reward_contract import check_reward, measure_reward
from .sampler_contract import check_sampler

__all__ = [
    "BrokenReplay",
    "ConstantReward",
    "Finding",
    "GivenPlan",
    "Property",
    "PropertyError",
    "TinyPolicy",
    "channel_reward",
    "check_objective",
    "check_policy",
    "check_reward",
    "check_sampler",
    "measure_reward",
    "prepare_second_device",
    "second_device",
]
