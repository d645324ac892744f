"""The exchangeable components of few-step training: small values that a run file swaps."""

from .advantages import Advantage, ExtremesAdvantage, GroupAdvantage, SignAdvantage
from .attribution import Attribution, Broadcast, Discounted, MonteCarlo
from .directions import (
    Distance,
    GeneratorMix,
    Huber,
    Joint,
    Normalizer,
    PerTerm,
    ShareMix,
    Squared,
    Unnormalized,
    VectorHuber,
    WeightedMix,
)
from .fake_targets import CleanTarget, ExactTarget, FakeTarget, WeightedCleanTarget
from .group_objectives import AdvantageWeighted, ExactSoftplus, GroupObjective, RewardWeighted, SigmoidWeighted
from .intervals import Interval, Overlap, Separate
from .query_times import FixedTime, LogitNormalTime, QueryTime, ShiftedTime
from .references import FrozenTeacher, MovingReference, Reference, Snapshot, StudentScore
from .stage_samplers import CleanerStages, EveryStage, FinalStage, StageSampler, UniformStages
from .trust_regions import NoTrustRegion, RatioClip, TrustRegion
from .update_plans import InOrder, Together, UpdatePlan

__all__ = [
    "Advantage",
    "AdvantageWeighted",
    "Attribution",
    "Broadcast",
    "CleanTarget",
    "CleanerStages",
    "Discounted",
    "Distance",
    "EveryStage",
    "ExactSoftplus",
    "ExactTarget",
    "ExtremesAdvantage",
    "FakeTarget",
    "FinalStage",
    "FixedTime",
    "FrozenTeacher",
    "GeneratorMix",
    "GroupAdvantage",
    "GroupObjective",
    "Huber",
    "InOrder",
    "Interval",
    "Joint",
    "LogitNormalTime",
    "MonteCarlo",
    "MovingReference",
    "NoTrustRegion",
    "Normalizer",
    "Overlap",
    "PerTerm",
    "QueryTime",
    "RatioClip",
    "Reference",
    "RewardWeighted",
    "Separate",
    "ShareMix",
    "ShiftedTime",
    "SigmoidWeighted",
    "SignAdvantage",
    "Snapshot",
    "Squared",
    "StageSampler",
    "StudentScore",
    "Together",
    "TrustRegion",
    "UniformStages",
    "Unnormalized",
    "UpdatePlan",
    "VectorHuber",
    "WeightedCleanTarget",
    "WeightedMix",
]
