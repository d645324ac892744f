"""Types, interfaces and the loop. Knows torch and attrs and no other part of the package."""

from .average import Average
from .contract import first_step_deviation
from .errors import CheckpointError, ConfigError, ContractError, NonFiniteError, RewardError
from .forking import fork_module
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
from .interfaces import (
    Aggregation,
    Devices,
    Hook,
    Objective,
    OptimizerFactory,
    Phase,
    PromptSource,
    Reward,
    RewardFunction,
    SingleProcess,
    TrajectorySampler,
)
from .ledger import Ledger
from .loop import AlignmentLoop, Report
from .policy import Guided, Policy, require_frozen
from .replay import Edges, micro_batched, replay, replay_log_prob
from .schedule import Constant, Cosine, Linear, Scalar, ShiftedGrid, resolution_shift, scalar, shifted_sigmas
from .scoring import score
from .streams import Streams
from .transition import CPS, Euler, FlowSDE, Gaussian, TransitionKernel
from .types import ROOT, Condition, Loss, Progress, Prompt, ScoredBatch, TrajectoryBatch

__all__ = [
    "CPS",
    "ROOT",
    "Aggregation",
    "AlignmentLoop",
    "Average",
    "CheckpointError",
    "Condition",
    "ConfigError",
    "Constant",
    "ContractError",
    "Cosine",
    "Devices",
    "Edges",
    "Euler",
    "FlowSDE",
    "Gaussian",
    "Guided",
    "Hook",
    "Ledger",
    "Linear",
    "Loss",
    "NonFiniteError",
    "Objective",
    "OptimizerFactory",
    "Phase",
    "Policy",
    "Progress",
    "Prompt",
    "PromptSource",
    "Raw",
    "Report",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Scalar",
    "ScoredBatch",
    "ShiftedGrid",
    "SingleProcess",
    "StandardizedParts",
    "StandardizedSum",
    "Streams",
    "TrajectoryBatch",
    "TrajectorySampler",
    "TransitionKernel",
    "first_step_deviation",
    "fork_module",
    "group_log_softmax",
    "group_mean",
    "group_normalize",
    "group_std",
    "group_sum",
    "log_geometric_mean_distance",
    "micro_batched",
    "replay",
    "replay_log_prob",
    "require_frozen",
    "resolution_shift",
    "scalar",
    "score",
    "shifted_sigmas",
]
