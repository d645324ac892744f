"""Memory of each process while a denoiser is loaded, forked and spread over two processes. Prints the table of docs/scaling.md.

A Stable Diffusion 3 transformer of random weights, 104 M numbers, is written into a copy of the embedded pipeline, in float32 and in
bfloat16; a run with reference and average is built from it in two gloo processes: as with `--shard`, and with each process loading the
whole denoiser first. A process's private memory is the `Pss_Anon` of Linux's /proc/self/smaps_rollup, and what it shares with the files
`Pss_File`, both less than before the load; the table shows private memory, of the process that has more. On a CPU the parts that are kept
count as private memory; elsewhere they lie on the device.

Args:
    json: where the table is written
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.record import RESULTS, write
from diffalign.core import AlignmentLoop, Average, Devices, Lockstep, Policy
from diffalign.embedded import SHAPEWORLD
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.processes.devices import TorchDevices, connect, disconnect
from diffalign.processes.sharding import FullySharded
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

CASES = {"LoRA, float32 files": ("float32", True), "full, float32 files": ("float32", False), "full, bfloat16 files": ("bfloat16", False)}


def write_pipeline(folder: Path, dtype: str) -> float:
    """The embedded pipeline with a larger denoiser of random weights; its bytes on the disk, in MB."""
    from diffusers import SD3Transformer2DModel

    shutil.copytree(SHAPEWORLD / "model", folder)
    config = SD3Transformer2DModel.load_config(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    larger = {"num_layers": 11, "num_attention_heads": 8, "attention_head_dim": 64, "caption_projection_dim": 512}
    network = SD3Transformer2DModel.from_config({**config, **larger})
    network.to(getattr(torch, dtype)).save_pretrained(folder / "transformer")
    return sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")) / 1e6


class Memory:
    """This process's memory in MB, more than at the start, and the most private memory that it had meanwhile."""

    def __init__(self) -> None:
        self.start = self._now()
        self.peak, self.ended = 0.0, False
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def more(self) -> dict[str, float]:
        gc.collect()
        return {name: round(value - self.start[name], 1) for name, value in self._now().items()}

    def end(self) -> float:
        self.ended = True
        self._watcher.join()
        return round(self.peak - self.start["private"], 1)

    def _watch(self) -> None:
        while not self.ended:
            words = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()
            self.peak = max(self.peak, int(words[1]) * 1024 / 1e6)
            time.sleep(0.005)

    def _now(self) -> dict[str, float]:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        found = {words[0]: int(words[1]) * 1024 / 1e6 for words in map(str.split, lines) if words[0].startswith("Pss_")}
        return {"private": found["Pss_Anon:"], "of_files": found["Pss_File:"]}


@attrs.frozen
class Measured:
    """`FullySharded`, between two looks at the memory.

    Args:
        inner: spreads the weights
        memory: of this process
        devices: the processes, which look at the same time
        found: gets what was seen
    """

    inner: FullySharded
    memory: Memory
    devices: Devices
    found: dict[str, Any]

    def shard(self, policies: Mapping[str, Policy], devices: Devices) -> Lockstep:
        self.found["forked"] = _together(self.memory, self.devices)
        lockstep = self.inner.shard(policies, devices)
        self.found["spread"] = _together(self.memory, self.devices)
        return lockstep


def _together(memory: Memory, devices: Devices) -> dict[str, float]:
    devices.barrier()
    seen = memory.more()
    devices.barrier()
    return seen


def measure(pipeline: str, lora: bool, waits: bool, out: Path) -> None:
    """What one of the processes does."""
    devices = connect()
    assert isinstance(devices, TorchDevices)
    FlowMatchingPolicy.from_pretrained("shapeworld", device="cpu")  # libraries are imported
    gc.collect()
    memory, found, sharding = Memory(), dict[str, Any](), FullySharded()
    policy = FlowMatchingPolicy.from_pretrained(
        pipeline, lora=LoRA(rank=16) if lora else None, device="cpu", sharding=sharding if waits else None
    )
    found["loaded"] = _together(memory, devices)
    measured: Any = Measured(sharding, memory, devices, found)  # the loop asks for `shard` alone
    loop = AlignmentLoop(
        SoftmaxTB(policy),
        TreeSampler(3, FixedPlan(splits=(1,), branches=2)),
        channel_reward,
        Prompts(["a red circle", "a blue square"]),
        prompts_per_step=2,
        average=Average(),
        devices=devices,
        sharding=measured,
    )
    found["peak"] = memory.end()
    found["numbers"] = sum(parameter.numel() for parameter in loop.objective.policy.parameters())
    (out / f"{devices.rank}.json").write_text(json.dumps(found))
    del loop, policy
    disconnect(devices)


def seen_by(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def main(json: Path = RESULTS / "spread_loading.json") -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = {dtype: write_pipeline(Path(folder) / dtype, dtype) for dtype in ("float32", "bfloat16")}
        for name, (dtype, lora) in CASES.items():
            for waits in (False, True):
                out = Path(folder) / f"{name}-{waits}"
                out.mkdir()
                words = [Path(folder) / dtype, int(lora), int(waits), out]
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", __name__]
                subprocess.run([*torchrun, *map(str, words)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                seen = seen_by(out)
                rows.append({"run": name, "waits": waits, "file_mb": sizes[dtype], "processes": seen})
    write(json, rows)
    print("| run | denoiser is loaded | loaded | forked | spread | peak |\n|---|---|---|---|---|---|")
    for row in rows:
        most = [max(one[stage]["private"] for one in row["processes"]) for stage in ("loaded", "forked", "spread")]
        cells = " | ".join(f"{value:,.0f} MB" for value in [*most, max(one["peak"] for one in row["processes"])])
        print(f"| {row['run']} | {'to be spread' if row['waits'] else 'whole'} | {cells} |")


if __name__ == "__main__":  # one of the two processes
    pipeline, lora, waits, out = sys.argv[1:]
    measure(pipeline, lora == "1", waits == "1", Path(out))
