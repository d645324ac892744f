"""Number of CPU threads of a process: few beside an accelerator, its share of the cores on a CPU.

torch takes as many as there are cores. Of several runs on one machine each then waits for the threads of all others, at every
operation that is spread over threads. The programs of the command line take a fair number; building an `AlignmentLoop` changes none, so
call `torch.set_num_threads` before `run`, or set OMP_NUM_THREADS.
"""

import os
from collections.abc import Mapping

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set the number of threads. If a user or torchrun has set one, it is kept."""

BESIDE_ACCELERATOR = 4
"""Number of threads beside an accelerator. One thread starts kernels; images and rewards gain little from more. Four runs fit 16 cores."""


def usable_cores() -> int:
    """Number of cores on which this process may run. It may be fewer than the machine has (taskset, SLURM, a container's cpuset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fair_threads(accelerated: bool, cores: int, environment: Mapping[str, str]) -> int | None:
    """Compute the number of threads for one process; None if the environment sets one.

    Args:
        accelerated: whether networks run on another device than the CPU
        cores: number of cores, see `usable_cores`
        environment: LOCAL_WORLD_SIZE, or WORLD_SIZE without it, is the number of processes that share the cores
    """
    if any(environment.get(name) for name in VARIABLES):
        return None
    processes = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or 1)
    share = max(1, cores // processes)
    return min(BESIDE_ACCELERATOR, share) if accelerated else share


def take_fair_threads(device: torch.device) -> None:
    """Set the number of threads of this process, never above torch's own number, which counts cores and not hyperthreads.

    Args:
        device: device of the policy
    """
    threads = fair_threads(device.type != "cpu", usable_cores(), os.environ)
    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def of_child(environment: Mapping[str, str], beside: int = 0) -> dict[str, str]:
    """Add a fair OMP_NUM_THREADS to the environment of a process beside this one, unless it is set.

    Args:
        environment: environment of the process that will be started
        beside: number of other such processes that compute at the same time
    """
    threads = fair_threads(torch.accelerator.is_available(), usable_cores(), environment)
    return (
        {**environment}
        if threads is None
        else {**environment, "OMP_NUM_THREADS": str(max(1, min(threads, torch.get_num_threads()) // (beside + 1)))}
    )
