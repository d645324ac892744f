"""Types, interfaces and the loop. Knows torch and attrs and no other part of the package.

The names are in two lists: those of who composes a run, runs it and looks at it, and those of who writes a policy, a sampler, an objective,
a reward or another part. What is in neither list is the package's own.
"""

# In the order of reading: what passes through a step, who makes it, and the loop that calls them. Nothing here is sorted by name.

# types
from .types import ROOT, UNRECORDED, Condition, Loss, Progress, Prompt, ScoredBatch, Size, TrajectoryBatch
from .streams import Streams

# policies, and other weights that are policies
from .policy import Policy, require_frozen
from .forking import fork_module
from .wrapper import PolicyAround
from .guided import Guidance, Guided
from .following import Follower
from .average import Average
from .host_weights import HostWeights

# a step of denoising, and where its sigmas come from
from .transition import CPS, Euler, FlowSDE, Gaussian, TransitionKernel
from .schedule import Constant, Cosine, Delayed, Linear, Ramp, Scalar, ShiftedGrid, resolution_shift, scalar, shifted_sigmas

# the interfaces of parts, and what a part can do beyond its own
from .update_rows import UpdateRows
from .interfaces import (
    Outline,
    TrajectorySampler,
    Objective,
    Phase,
    Reward,
    RewardFunction,
    Aggregation,
    PromptSource,
    Budgeted,
    Listed,
    Planned,
    Stateful,
    GroupReward,
    StepReward,
    Sourced,
    Demanding,
    Attended,
)

# rewards: called, then brought to one number within the group
from .scores import Partial, Scores
from .scoring import score
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
from .running_scale import RunningScale

# replay: stored edges under the present weights
from .replay import Edges, replay, replay_log_prob, replay_parents, micro_batched
from .contract import check_first_step

# the loop, and what it says
from .loop import AlignmentLoop, Hook
from .rollout import Rollout, Sequential, Stages
from .overlapped import Overlapped
from .outcome import Outcome
from .report import Evaluated, Report
from .ledger import Ledger
from .processes import Devices, Lockstep, Sharding, SingleProcess, agree

# what goes wrong
from .errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    NonFiniteError,
    NonFiniteRewardError,
    ProcessError,
    RewardError,
    UpdateError,
)
from .interrupt import Interrupted

# For users, who compose a run, run it and look at it.
__all__ = [
    # the loop and its hooks
    "AlignmentLoop",
    "Average",
    "Sequential",
    "Overlapped",
    "SingleProcess",
    "Hook",
    "Outcome",
    "Report",
    "Evaluated",
    "Ledger",
    # what passes through a step
    "Prompt",
    "Progress",
    "Streams",
    "ScoredBatch",
    "score",
    # policies: guidance, the step rule, the sigmas
    "Guided",
    "CPS",
    "FlowSDE",
    "Euler",
    "ShiftedGrid",
    "resolution_shift",
    # several rewards -> one number
    "Raw",
    "StandardizedParts",
    "StandardizedSum",
    "RunningScale",
    # numbers that change over a run
    "Constant",
    "Linear",
    "Cosine",
    "Delayed",
    "Ramp",
    # what goes wrong
    "ConfigError",
    "ContractError",
    "NonFiniteError",
    "NonFiniteRewardError",
    "RewardError",
    "CheckpointError",
    "ProcessError",
    "UpdateError",
    "Interrupted",
]

# For authors, who write a policy, a sampler, an objective, a reward or another part.
__all__ += [
    # what passes through a step
    "Condition",
    "TrajectoryBatch",
    "ROOT",
    "UNRECORDED",
    "Loss",
    "Size",
    # a policy
    "Policy",
    "PolicyAround",
    "Guidance",
    "TransitionKernel",
    "Gaussian",
    "shifted_sigmas",
    "fork_module",
    "HostWeights",
    "check_first_step",
    # a sampler
    "TrajectorySampler",
    "Outline",
    # an objective
    "Objective",
    "Phase",
    "UpdateRows",
    "Edges",
    "replay",
    "replay_log_prob",
    "replay_parents",
    "micro_batched",
    "group_mean",
    "group_sum",
    "group_std",
    "group_normalize",
    "group_log_softmax",
    "log_geometric_mean_distance",
    "Follower",
    "require_frozen",
    "Scalar",
    "scalar",
    # a reward, an aggregation, a source of prompts
    "Reward",
    "RewardFunction",
    "GroupReward",
    "StepReward",
    "Partial",
    "Scores",
    "Aggregation",
    "PromptSource",
    # what any of them can do beyond its interface
    "Attended",
    "Budgeted",
    "Demanding",
    "Listed",
    "Planned",
    "Sourced",
    "Stateful",
    # a rollout, and the processes of a run
    "Rollout",
    "Stages",
    "Devices",
    "Sharding",
    "Lockstep",
    "agree",
]
