"""Tiny random pipelines of the tests, whose folder is no package."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[2] / "tests")

sys.path.append(TESTS)
from tiny_pipelines import BUILD, built  # noqa: E402

sys.path.remove(TESTS)

__all__ = ["BUILD", "built"]
