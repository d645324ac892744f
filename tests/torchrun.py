"""Programs on two processes, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def launch(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a program, or "-m" and a module, under torchrun with two gloo processes of one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    return subprocess.run([*torchrun, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240, check=False)
