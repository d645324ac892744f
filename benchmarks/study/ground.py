"""Roughness of the ground of ShapeWorld pictures, by the colour of the shapes: base, base with guidance, and student.

    roughness = mean |Laplacian| of the grey value over pixels that lie at least 5 from any ink and 2 from the edge; drawn pictures have 0

All rows have the same decoder and the same initial noise.

Args:
    samples: pictures of each of two prompts a colour
    seed: of the noise
    json: also write the numbers here
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import Record
from benchmarks.study.tdm_r1 import start
from diffalign import Prompt
from diffalign.core import Guided, Policy, Progress, Streams
from diffalign.samplers import DeterministicSampler
from diffalign.shapeworld import COLORS

POLICIES: Mapping[str, Callable[[Policy, Policy], tuple[Policy, int]]] = {
    "base, 50 steps": lambda base, student: (base, 50),
    "base, 50 steps, guidance 3": lambda base, student: (Guided(base, 3.0), 50),
    "base, 8 steps": lambda base, student: (base, 8),
    "student, 4 steps": lambda base, student: (student, 4),
}
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]


def roughness(images: Tensor) -> float:
    """Mean |Laplacian| of the ground of images [K, 3, H, W] in [0, 1]."""
    ground = images.flatten(2).median(dim=2).values[:, :, None, None]
    ink = ((images - ground).abs().amax(dim=1, keepdim=True) > 0.15).float()
    near = nn.functional.max_pool2d(ink, 9, stride=1, padding=4) > 0
    rough = nn.functional.conv2d(images.mean(dim=1, keepdim=True), LAPLACIAN).abs()
    inner = slice(2, -2)
    return float(rough[..., 1:-1, 1:-1][~near[..., inner, inner]].mean())


@torch.no_grad()
def by_color(policy: Policy, steps: int, samples: int, seed: int) -> dict[str, float]:
    row = {}
    for color in COLORS:
        prompts = [Prompt(f"two {color} circles"), Prompt(f"three {color} squares")]
        batch = DeterministicSampler(steps, samples).sample(policy, policy.encode(prompts), Progress(0, 1), Streams(seed))
        row[color] = roughness(policy.decode(batch.samples).float())
    return row


def main(samples: int = 8, seed: int = 5, json: Path | None = None) -> None:
    student = start()
    base = student.policy.fork(pristine=True)
    record = Record(json, {"samples": samples, "seed": seed})
    print(f"{'':28s}" + "".join(f"{color:>10s}" for color in COLORS))
    for name, make in POLICIES.items():
        row = record.once(record.content.setdefault("rows", {}), name, lambda make=make: by_color(*make(base, student), samples, seed))
        print(f"{name:28s}" + "".join(f"{value:10.4f}" for value in row.values()), flush=True)
