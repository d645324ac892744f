"""A reward server in a process of its own, which scores by a function that a benchmark gives as text."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(source: str, function: str, *options: str) -> Iterator[tuple[str, int, Path]]:
    """`diffalign serve-reward` of a function of a module with this source, as long as the block lasts: its url, process and folder."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "own_reward.py").write_text(source)
        Path(folder, "reward.yaml").write_text(f"own_reward.{function}\n")
        command = [sys.executable, "-m", "diffalign", "serve-reward", "reward.yaml", "--port", "0", "--device", "cpu", *options]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1], server.pid, Path(folder)
        finally:
            server.kill()
            server.communicate()
