"""The policy and the forests that the GPU check looks at."""

import argparse
from typing import Any

import torch

from diffalign import Progress, Prompt, Streams
from diffalign.core import Policy, ShiftedGrid, TrajectoryBatch, TrajectorySampler
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import PromptFile

Row = dict[str, Any]
"""What came of a case: its name, whether it holds, and numbers."""


def embedded(options: argparse.Namespace, dtype: str = "float32", **settings: Any) -> FlowMatchingPolicy:
    torch.manual_seed(0)
    given = {
        "lora": LoRA(rank=4),
        "grid": ShiftedGrid(3.0),
        "max_sequence_length": 16,
        "device": options.device,
        "dtype": dtype,
        **settings,
    }
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", **given)
    with torch.no_grad():  # adapters that say something
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=2e-2)
    return policy


def forest_of(policy: Policy, sampler: TrajectorySampler, prompts: int) -> TrajectoryBatch:
    texts = [Prompt(str(prompt)) for prompt in PromptFile("shapeworld/count").draw(0, prompts)]
    with torch.no_grad():
        return sampler.sample(policy, policy.encode(texts), Progress(0, 1), Streams(3))
