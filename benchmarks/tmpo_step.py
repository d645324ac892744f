"""Network rows, calls and seconds of one TMPO step: one batched call a step and unique-parent replay, against one branch at a time.

python benchmarks/tmpo_step.py [--repeats 5] [--json FILE]

For each schedule three ways of doing the same step (rollout of one prompt, one update) are timed in turns in one process:
  branches   every branch is forwarded alone, and the update evaluates every stochastic step of every leaf (as TMPO's release does)
  diffalign  TreeSampler and SoftmaxTB
  graph      the same with TreeSampler(keep_graph=True): the update evaluates no row
  by hand    a loop that makes only the network calls that a tree needs, on random tensors of the same shapes: the floor
Read the counts and the ratios; seconds are this machine's. The reference's rows are reported apart: "path" has none, "relative" adds the
update's rows without gradient. A second table shows the peak of live tensors in the update as leaves grow, at a fixed row budget.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from tree_steps import PeakOfOutputs, branch_by_branch, measured, ours

from diffalign import Progress, Prompt, Streams
from diffalign.core import CPS, Condition, Policy, ShiftedGrid
from diffalign.policies import FlowMatchingPolicy, LoRA, NetworkPolicy
from diffalign.samplers import Branching, FixedPlan

SCHEDULES = {
    "T=6 [1,3,4] promoted": (6, FixedPlan((1, 3, 4), promote_roots=True)),
    "T=6 [2,3,4]": (6, FixedPlan((2, 3, 4))),
    "T=28 [7,14,21]": (28, FixedPlan((7, 14, 21))),
}


class FluxField(nn.Module):
    """A small random FLUX.1 transformer (0.5 M parameters, 64 image and 32 text tokens) as an unconditional velocity field."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        )
        self.register_buffer("text", torch.randn(1, 32, 32))
        self.register_buffer("pooled", torch.randn(1, 32))
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        self.register_buffer("places", torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], dim=1))

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        count = len(latents)
        packed = latents.view(count, 16, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, 64, 64)
        output = self.network(
            hidden_states=packed,
            timestep=sigma,
            encoder_hidden_states=self.text.expand(count, -1, -1),
            pooled_projections=self.pooled.expand(count, -1),
            txt_ids=torch.zeros(32, 3),
            img_ids=self.places,
            return_dict=False,
        )[0]
        return output.view(count, 8, 8, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def policies() -> dict[str, Policy]:
    return {
        "tiny Flux": NetworkPolicy(FluxField(), (16, 16, 16), decode=lambda latents: latents[:, :3], kernel=CPS("squared"), shift=1.8776),
        "embedded": FlowMatchingPolicy.from_pretrained(
            "shapeworld", lora=LoRA(), kernel=CPS("squared"), grid=ShiftedGrid(2.0), max_sequence_length=16
        ),
    }


def by_hand(policy: Policy, one: Condition, steps: int, branching: Branching) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    sigmas, shape = policy.sigmas(steps), policy.latent_shape
    noisy = [(width, step) for step, (width, eta) in enumerate(zip(branching.widths, branching.noise_levels, strict=False)) if eta > 0]
    rows = torch.cat([sigmas[step].expand(width) for width, step in noisy])

    def rollout() -> Tensor:
        with torch.no_grad():
            for width, sigma in zip(branching.widths[:-1], sigmas[:-1], strict=True):
                policy.velocity(torch.randn(width, *shape), sigma.expand(width), one.select(torch.zeros(width, dtype=torch.long)))
        return torch.randn(len(rows), *shape)

    def update(latents: Tensor) -> None:
        policy.velocity(latents, rows, one.select(torch.zeros(len(rows), dtype=torch.long))).square().mean().backward()
        policy.zero_grad(set_to_none=True)

    return rollout, update


def compare(policy: Policy, steps: int, plan: FixedPlan, repeats: int) -> dict[str, dict[str, float]]:
    branching = plan.draw(steps, Progress(0, 1), Streams(0))
    condition = policy.encode([Prompt("three red circles")])
    ways = {
        "branches": branch_by_branch(policy, condition, branching),
        "diffalign": ours(policy, condition, steps, plan),
        "graph": ours(policy, condition, steps, plan, keep_graph=True),
        "by hand": by_hand(policy, condition, steps, branching),
    }
    table: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for turn in range(repeats + 1):
        for way, (rollout, update) in ways.items():
            for key, value in measured(policy, rollout, update).items():
                if turn:  # the first warms up
                    table[way].setdefault(key, []).append(value)
    return {way: {key: statistics.median(values) for key, values in row.items()} for way, row in table.items()}


def update_memory(policy: Policy, leaves: int, rows: int) -> int:
    """Peak bytes of an update with a tree of that many leaves, 3 levels at most, and a row budget."""
    levels = {9: (1, 2), 27: (1, 2, 3), 81: (1, 2, 3, 4), 243: (1, 2, 3, 4, 5)}[leaves]
    rollout, update = ours(policy, policy.encode([Prompt("three red circles")]), 8, FixedPlan(levels), update_rows=rows)
    batch = rollout()
    _ = batch.trajectories.paths, batch.trajectories.stochastic
    gc.collect()
    with PeakOfOutputs() as peak:
        update(batch)
    return peak.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=9, help="row budget of the memory table")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, dict] = {"steps": {}, "memory": {}}
    print(f"{'':34s} {'rollout':>22s} {'update':>22s}")
    print(f"{'':34s} {'rows':>6s} {'calls':>6s} {'s':>8s} {'rows':>6s} {'calls':>6s} {'s':>8s} {'of branches':>12s} {'of by hand':>11s}")
    for name, policy in policies().items():
        for schedule, (steps, plan) in SCHEDULES.items():
            table = compare(policy, steps, plan, arguments.repeats)
            result["steps"][f"{name}, {schedule}"] = table
            print(f"{name}, {schedule}")
            total = {way: row["rollout_s"] + row["update_s"] for way, row in table.items()}
            for way, row in table.items():
                print(
                    f"{'  ' + way:34s} {row['rollout_rows']:6.0f} {row['rollout_calls']:6.0f} {row['rollout_s']:8.3f} "
                    f"{row['update_rows']:6.0f} {row['update_calls']:6.0f} {row['update_s']:8.3f} "
                    f"{total[way] / total['branches']:12.2f} {total[way] / total['by hand']:11.2f}"
                )
        result["memory"][name] = {leaves: update_memory(policy, leaves, arguments.rows) for leaves in (9, 27, 81, 243)}
    print(f"\npeak of live tensors in the update, {arguments.rows} rows a piece (MB)")
    for name, row in result["memory"].items():
        print(f"{name:34s} " + "  ".join(f"{leaves} leaves {size / 1e6:.1f}" for leaves, size in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
