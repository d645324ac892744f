"""What the author of a new part tests it with: small doubles in closed form, and (in `strategies`) hypothesis strategies."""

from .doubles import ConstantReward, GivenPlan, SlippedReplay, TinyPolicy, channel_reward

__all__ = ["ConstantReward", "GivenPlan", "SlippedReplay", "TinyPolicy", "channel_reward"]
