"""How many CPU threads a process takes: few beside an accelerator, its share of the cores on a CPU.

torch takes as many as there are cores. Of several runs on one machine each then waits for the threads of all others, at every
operation that is spread over threads. The programs of the command line take a fair number; building an `AlignmentLoop` changes none, so
call `torch.set_num_threads` before `run`, or set OMP_NUM_THREADS.
"""

import os
from collections.abc import Mapping

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Where a user, or torchrun, has set one of these, it stays."""

BESIDE_ACCELERATOR = 4
"""The CPU then starts kernels, on one thread, and handles pictures and rewards, which gain little from more; four runs fit 16 cores."""


def usable_cores() -> int:
    """Those that this process may run on, which may be fewer than the machine has (taskset, SLURM, a container's cpuset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fair_threads(accelerated: bool, cores: int, environment: Mapping[str, str]) -> int | None:
    """The number of threads for one process; None where the environment names one.

    Args:
        accelerated: whether networks are evaluated elsewhere than on the CPU
        cores: as `usable_cores`
        environment: LOCAL_WORLD_SIZE, or WORLD_SIZE without it, is the number of processes that share the cores
    """
    if any(environment.get(name) for name in VARIABLES):
        return None
    processes = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or 1)
    share = max(1, cores // processes)
    return min(BESIDE_ACCELERATOR, share) if accelerated else share


def take_fair_threads(device: torch.device) -> None:
    """Give this process its number of threads, never more than it has: torch counts cores, not hyperthreads.

    Args:
        device: of the policy
    """
    threads = fair_threads(device.type != "cpu", usable_cores(), os.environ)
    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def of_child(environment: Mapping[str, str], beside: int = 0) -> dict[str, str]:
    """`environment` with a fair OMP_NUM_THREADS for a process beside this one, where it names none.

    Args:
        environment: of the process to be started
        beside: other such processes that compute at the same time
    """
    threads = fair_threads(torch.accelerator.is_available(), usable_cores(), environment)
    return (
        {**environment}
        if threads is None
        else {**environment, "OMP_NUM_THREADS": str(max(1, min(threads, torch.get_num_threads()) // (beside + 1)))}
    )
