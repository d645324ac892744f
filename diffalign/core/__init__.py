"""Types, interfaces and the loop. Knows torch and attrs and no other part of the package."""

from .average import Average
from .contract import FirstStep, check_first_step
from .errors import (
    BrokenCallError,
    CheckpointError,
    ConfigError,
    ContractError,
    Evidence,
    NonFiniteError,
    NonFiniteRewardError,
    PeerFailed,
    ProcessError,
    RewardError,
)
from .following import Follower
from .forking import fork_module, view_of
from .groups import (
    Raw,
    StandardizedParts,
    StandardizedSum,
    group_log_softmax,
    group_mean,
    group_normalize,
    group_std,
    group_sum,
    log_geometric_mean_distance,
)
from .guided import Guidance, Guided
from .host_weights import HostWeights
from .interfaces import (
    Aggregation,
    Budgeted,
    Demanding,
    GroupReward,
    Listed,
    Objective,
    OptimizerFactory,
    Phase,
    Planned,
    PromptSource,
    Reward,
    RewardFunction,
    Sourced,
    Stateful,
    TrajectorySampler,
)
from .interrupt import Interrupted
from .ledger import Ledger
from .loop import AlignmentLoop, Hook
from .overlapped import Overlapped
from .policy import Policy, require_frozen
from .processes import Devices, Free, Lockstep, Sharding, SingleProcess, agree, gather_texts
from .replay import Edges, micro_batched, replay, replay_log_prob, replay_parents
from .report import Evaluated, Report
from .rollout import Rollout, Sequential, Stages
from .running_scale import RunningScale
from .schedule import Constant, Cosine, Linear, Ramp, Scalar, ShiftedGrid, resolution_shift, scalar, shifted_sigmas
from .scores import Partial, Scores
from .scoring import score
from .streams import Streams
from .transition import CPS, Euler, FlowSDE, Gaussian, TransitionKernel
from .types import ROOT, UNRECORDED, Condition, Loss, Progress, Prompt, ScoredBatch, Size, TrajectoryBatch
from .wrapper import PolicyAround

__all__ = [
    "CPS",
    "ROOT",
    "UNRECORDED",
    "Aggregation",
    "AlignmentLoop",
    "Average",
    "BrokenCallError",
    "Budgeted",
    "CheckpointError",
    "Condition",
    "ConfigError",
    "Constant",
    "ContractError",
    "Cosine",
    "Demanding",
    "Devices",
    "Edges",
    "Euler",
    "Evaluated",
    "Evidence",
    "FirstStep",
    "FlowSDE",
    "Follower",
    "Free",
    "Gaussian",
    "GroupReward",
    "Guidance",
    "Guided",
    "Hook",
    "HostWeights",
    "Interrupted",
    "Ledger",
    "Linear",
    "Listed",
    "Lockstep",
    "Loss",
    "NonFiniteError",
    "NonFiniteRewardError",
    "Objective",
    "OptimizerFactory",
    "Overlapped",
    "Partial",
    "PeerFailed",
    "Phase",
    "Planned",
    "Policy",
    "PolicyAround",
    "ProcessError",
    "Progress",
    "Prompt",
    "PromptSource",
    "Ramp",
    "Raw",
    "Report",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Rollout",
    "RunningScale",
    "Scalar",
    "ScoredBatch",
    "Scores",
    "Sequential",
    "Sharding",
    "ShiftedGrid",
    "SingleProcess",
    "Size",
    "Sourced",
    "Stages",
    "StandardizedParts",
    "StandardizedSum",
    "Stateful",
    "Streams",
    "TrajectoryBatch",
    "TrajectorySampler",
    "TransitionKernel",
    "agree",
    "check_first_step",
    "fork_module",
    "gather_texts",
    "group_log_softmax",
    "group_mean",
    "group_normalize",
    "group_std",
    "group_sum",
    "log_geometric_mean_distance",
    "micro_batched",
    "replay",
    "replay_log_prob",
    "replay_parents",
    "require_frozen",
    "resolution_shift",
    "scalar",
    "score",
    "shifted_sigmas",
    "view_of",
]
