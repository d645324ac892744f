"""What the GPU check is asked for, and the policy and the forests that it looks at."""

from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from diffalign import Prompt
from diffalign.core import Policy, Progress, ShiftedGrid, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import PromptFile

Row = dict[str, Any]
"""What came of a case: its name, whether it holds, and numbers."""
PARTS = ("matrix", "contract", "faults", "resume", "memory", "demo", "tf32", "attention", "filled", "compile", "graphs", "together")
SHAPES = ("flux", "sd3", "tiny-flux", "tiny-sd3")
GPU = torch.cuda.is_available()
SOME = attrs.validators.min_len(1)


@attrs.frozen
class Options:
    """What is checked.

    Args:
        only: parts; `together` only if it is named
        device: cuda, or far for the pretended one
        large: shapes of `attention`
        settings: of `attention`: the first so many of 6
        tiny: a few grids and no large batches; always without a GPU
        every: every so many cases of the matrix
        quick: `contract` in float32 with two chains alone, `resume` of TMPO alone
        steps: of `demo`
        json: also write the rows here, after each
    """

    only: tuple[Literal[*PARTS], ...] = attrs.field(default=PARTS[:-1], validator=SOME)
    device: str = "cuda" if GPU else "far"
    large: tuple[Literal[*SHAPES], ...] = attrs.field(default=SHAPES[:2] if GPU else SHAPES[2:], validator=SOME)
    settings: int = 2
    tiny: bool = not GPU
    every: int = 1
    quick: bool = False
    steps: int = 10
    json: Path | None = None


def embedded(options: Options, dtype: str = "float32", **settings: Any) -> FlowMatchingPolicy:
    torch.manual_seed(0)
    given = {"lora": LoRA(rank=4), "grid": ShiftedGrid(3.0), "max_sequence_length": 16, "dtype": dtype, **settings}
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", device=options.device, **given)
    with torch.no_grad():  # adapters that say something
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=2e-2)
    return policy


def forest_of(policy: Policy, sampler: TrajectorySampler, prompts: int) -> TrajectoryBatch:
    texts = [Prompt(str(prompt)) for prompt in PromptFile("shapeworld/count").draw(0, prompts)]
    with torch.no_grad():
        return sampler.sample(policy, policy.encode(texts), Progress(0, 1), Streams(3))
