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
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import Progress, Prompt, Streams
from diffalign.core import CPS, Policy, ScoredBatch, ShiftedGrid
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA, NetworkPolicy
from diffalign.samplers import Branching, FixedPlan, TreeSampler, roll_out

SCHEDULES = {
    "T=6 [1,3,4] promoted": (6, FixedPlan((1, 3, 4), promote_roots=True)),
    "T=6 [2,3,4]": (6, FixedPlan((2, 3, 4))),
    "T=28 [7,14,21]": (28, FixedPlan((7, 14, 21))),
}
SUB_BATCH = 9
"""Leaves per call in the release's update."""


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


def scored(trajectories) -> ScoredBatch:
    rewards = torch.linspace(0, 1, len(trajectories.leaves))
    return ScoredBatch(trajectories, rewards, {"r": rewards}, 1, Progress(0, 1), Streams(0))


def finish(policy: Policy, losses) -> None:
    for loss in losses:
        loss.value.backward()
    policy.zero_grad(set_to_none=True)


def ours(policy: Policy, steps: int, plan: FixedPlan, keep_graph: bool) -> tuple[Callable[[], ScoredBatch], Callable[[ScoredBatch], None]]:
    objective = SoftmaxTB(policy, measure="path")
    sampler = TreeSampler(steps, plan, keep_graph=keep_graph)

    def rollout() -> ScoredBatch:
        with torch.no_grad():
            return scored(sampler.sample(policy, policy.encode([Prompt("three red circles")]), Progress(0, 1), Streams(0)))

    return rollout, lambda batch: finish(policy, objective.phases()[0].losses(batch, 0))


def branch_by_branch(policy: Policy, steps: int, branching: Branching) -> tuple[Callable[[], ScoredBatch], Callable[[ScoredBatch], None]]:
    def rollout() -> ScoredBatch:
        with torch.no_grad():
            return scored(roll_out(policy, policy.encode([Prompt("three red circles")]), branching, Streams(0), rows=1))

    def update(batch: ScoredBatch) -> None:
        forest = batch.trajectories
        noisy = forest.noise_level[forest.paths] > 0
        total = torch.zeros(len(forest.leaves), dtype=torch.float64)
        for some in torch.arange(len(forest.leaves)).split(SUB_BATCH):
            for step in range(forest.paths.shape[1]):
                child = forest.paths[some, step]
                if not bool(noisy[some, step].all()):
                    continue
                parent = forest.parent[child]
                level = forest.level[parent]
                condition = forest.condition.select(forest.prompt[parent])
                transition = policy.transition(
                    forest.latents[parent], forest.sigmas[level], forest.sigmas[level + 1], condition, forest.noise_level[child]
                )
                total = total.index_add(0, some, transition.log_prob(forest.latents[child]))
        (-(batch.rewards.double() * (total - total.detach()).exp()).mean()).backward()
        policy.zero_grad(set_to_none=True)

    return rollout, update


def by_hand(policy: Policy, steps: int, branching: Branching) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    sigmas, shape = policy.sigmas(steps), policy.latent_shape
    one = policy.encode([Prompt("three red circles")])
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


def timed(policy: Policy, work: Callable, *arguments) -> tuple[object, int, int, float]:
    """Result, rows, calls, seconds."""
    rows, calls = policy.counter.rows, policy.counter.calls
    start = time.perf_counter()
    result = work(*arguments)
    return result, policy.counter.rows - rows, policy.counter.calls - calls, time.perf_counter() - start


def compare(policy: Policy, steps: int, plan: FixedPlan, repeats: int) -> dict[str, dict[str, float]]:
    branching = plan.draw(steps, Progress(0, 1), Streams(0))
    ways = {
        "branches": branch_by_branch(policy, steps, branching),
        "diffalign": ours(policy, steps, plan, keep_graph=False),
        "graph": ours(policy, steps, plan, keep_graph=True),
        "by hand": by_hand(policy, steps, branching),
    }
    table: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for turn in range(repeats + 1):
        for way, (rollout, update) in ways.items():
            batch, rows, calls, seconds = timed(policy, rollout)
            _, update_rows, update_calls, update_seconds = timed(policy, update, batch)
            if turn:  # the first warms up
                for key, value in zip(
                    ("rollout_rows", "rollout_calls", "rollout_s", "update_rows", "update_calls", "update_s"),
                    (rows, calls, seconds, update_rows, update_calls, update_seconds),
                    strict=True,
                ):
                    table[way].setdefault(key, []).append(value)
    return {way: {key: statistics.median(values) for key, values in row.items()} for way, row in table.items()}


class PeakOfOutputs(TorchDispatchMode):
    """The largest sum of live bytes among tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.live:
                    self.live[key] = storage.nbytes()
                    _on_free(storage, self.live, key)
                    self.peak = max(self.peak, sum(self.live.values()))
        return result


def _on_free(storage, live: dict[int, int], key: int) -> None:
    import weakref

    weakref.finalize(storage, live.pop, key, None)


def update_memory(policy: Policy, leaves: int, rows: int) -> int:
    """Peak bytes of an update with a tree of that many leaves, 3 levels at most, and a row budget."""
    levels = {9: (1, 2), 27: (1, 2, 3), 81: (1, 2, 3, 4), 243: (1, 2, 3, 4, 5)}[leaves]
    sampler = TreeSampler(8, FixedPlan(levels))
    with torch.no_grad():
        batch = scored(sampler.sample(policy, policy.encode([Prompt("three red circles")]), Progress(0, 1), Streams(0)))
    _ = batch.trajectories.paths, batch.trajectories.stochastic
    objective = SoftmaxTB(policy, measure="path", rows=rows)
    gc.collect()
    with PeakOfOutputs() as peak:
        for loss in objective.phases()[0].losses(batch, 0):
            loss.value.backward()
    policy.zero_grad(set_to_none=True)
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
