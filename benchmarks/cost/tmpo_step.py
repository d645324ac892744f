"""Network rows, calls and seconds of one TMPO step: one batched call a step and unique-parent replay, against one branch at a time.

For each schedule three ways of doing the same step (rollout of one prompt, one update) are timed in turns in one process:
  branches   every branch is forwarded alone, and the update evaluates every stochastic step of every leaf (as TMPO's release does)
  diffalign  TreeSampler and SoftmaxTB
  graph      the same with TreeSampler(keep_graph=True): the update evaluates no row
  by hand    a loop that makes only the network calls that a tree needs, on random tensors of the same shapes: the floor
Read the counts and the ratios; seconds are this machine's. The reference's rows are reported apart: "path" has none, "relative" adds the
update's rows without gradient.

A second table shows how much memory the update takes beyond what was there before it (weights, the rollout's batch) as leaves grow, at
fixed row budgets: bytes of live tensors, counted, hence exact. RatioNorm looks at the means of the steps and not at log-probabilities
alone. A tree of 9 leaves has 4 rows to replay and does not fill a budget of 9. The gradients of all weights are there from the second piece
on, so they are part of the peak wherever there is one: 4.8 MB of the tiny Flux, which trains every weight.

Args:
    repeats: of each way, after the one that warms up
    rows: budgets of the table of memory
    only: tables
    json: also write the tables here; one that is not made stays as it is in the file
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.cost.tree_steps import branch_by_branch, measured, ours
from benchmarks.record import Record
from benchmarks.subjects.random_families import small_flux
from diffalign import Prompt
from diffalign.core import CPS, Condition, Policy, Progress, ShiftedGrid, Streams
from diffalign.costs.live import LiveBytes
from diffalign.objectives import RatioNorm
from diffalign.policies import FlowMatchingPolicy, LoRA, NetworkPolicy
from diffalign.samplers import Branching, FixedPlan, TreeSampler

SCHEDULES = {
    "T=6 [1,3,4] promoted": (6, FixedPlan((1, 3, 4), promote_roots=True)),
    "T=6 [2,3,4]": (6, FixedPlan((2, 3, 4))),
    "T=28 [7,14,21]": (28, FixedPlan((7, 14, 21))),
}

TABLES = ("steps", "memory")
SPLITS = {9: (1, 2), 27: (1, 2, 3), 81: (1, 2, 3, 4), 243: (1, 2, 3, 4, 5)}
"""Leaves of the trees of the memory table, and the steps of 8 at which each node has three children."""


class FluxField(nn.Module):
    """A small random FLUX.1 transformer (64 image and 32 text tokens) as an unconditional velocity field."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = small_flux()
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
        "diffalign": ours(policy, condition, TreeSampler(steps, plan)),
        "graph": ours(policy, condition, TreeSampler(steps, plan, keep_graph=True)),
        "by hand": by_hand(policy, condition, steps, branching),
    }
    table: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for turn in range(repeats + 1):
        for way, (rollout, update) in ways.items():
            for key, value in measured(policy, rollout, update).items():
                if turn:  # the first warms up
                    table[way].setdefault(key, []).append(value)
    return {way: {key: statistics.median(values) for key, values in row.items()} for way, row in table.items()}


def update_memory(policy: Policy, splits: tuple[int, ...], rows: int, ratio_norm: RatioNorm | None) -> dict[str, int]:
    """Peak bytes of an update above what was there before it, and bytes of the batch, which was."""
    condition = policy.encode([Prompt("three red circles")])
    rollout, update = ours(policy, condition, TreeSampler(8, FixedPlan(splits)), rows=rows, ratio_norm=ratio_norm)
    batch = rollout()
    gc.collect()
    with LiveBytes() as live:
        update(batch)
    return {"peak": live.peak, "batch": batch.trajectories.latents.nbytes + batch.trajectories.mean.nbytes}


def memory(budgets: Sequence[int]) -> dict[str, dict[int, dict[int, dict[str, int]]]]:
    """Name -> row budget -> leaves -> bytes, printed as they come."""
    print("\npeak of live tensors in the update, above what was there before it (MB)")
    print(f"{'':22s} {'rows':>5s} " + " ".join(f"{leaves:>5d} leaves" for leaves in SPLITS) + "   bytes a leaf, 81 to 243")
    table: dict[str, dict[int, dict[int, dict[str, int]]]] = {}
    for policy_name, policy in policies().items():
        for name, ratio_norm in {policy_name: None, f"{policy_name}, RatioNorm": RatioNorm()}.items():
            table[name] = {}
            for rows in budgets:
                row = {leaves: update_memory(policy, splits, rows, ratio_norm) for leaves, splits in SPLITS.items()}
                table[name][rows] = row
                peaks = " ".join(f"{size['peak'] / 1e6:12.2f}" for size in row.values())
                print(f"{name:22s} {rows:5d} {peaks}   {(row[243]['peak'] - row[81]['peak']) / (243 - 81):.0f}", flush=True)
        batches = " ".join(f"{size['batch'] / 1e6:12.2f}" for size in row.values())
        print(f"{'  its batch':22s} {'':5s} {batches}   {(row[243]['batch'] - row[81]['batch']) / (243 - 81):.0f}")
    return table


def seconds(repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Policy and schedule -> way -> counts and medians, printed as they come."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':34s} {'rollout':>22s} {'update':>22s}")
    print(f"{'':34s} {'rows':>6s} {'calls':>6s} {'s':>8s} {'rows':>6s} {'calls':>6s} {'s':>8s} {'of branches':>12s} {'of by hand':>11s}")
    for name, policy in policies().items():
        for schedule, (steps, plan) in SCHEDULES.items():
            table = compare(policy, steps, plan, repeats)
            result[f"{name}, {schedule}"] = table
            print(f"{name}, {schedule}")
            total = {way: row["rollout_s"] + row["update_s"] for way, row in table.items()}
            for way, row in table.items():
                print(
                    f"{'  ' + way:34s} {row['rollout_rows']:6.0f} {row['rollout_calls']:6.0f} {row['rollout_s']:8.3f} "
                    f"{row['update_rows']:6.0f} {row['update_calls']:6.0f} {row['update_s']:8.3f} "
                    f"{total[way] / total['branches']:12.2f} {total[way] / total['by hand']:11.2f}"
                )
    return result


def main(repeats: int = 5, rows: tuple[int, ...] = (2, 9), only: tuple[Literal[*TABLES], ...] = TABLES, json: Path | None = None) -> None:
    record = Record(json)
    for table in only:
        record.content[table] = seconds(repeats) if table == "steps" else memory(rows)
        record.save()
