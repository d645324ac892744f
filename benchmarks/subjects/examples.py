"""The ring of `examples/`, as modules, whose bare names the tests use for modules of their own."""

import sys
from pathlib import Path

EXAMPLES = str(Path(__file__).parents[2] / "examples")

_other = sys.modules.pop("ring", None)
sys.path.insert(0, EXAMPLES)
import ring  # noqa: E402
import ring_tdm_r1  # noqa: E402

sys.path.remove(EXAMPLES)
del sys.modules["ring"]
if _other is not None:
    sys.modules["ring"] = _other

__all__ = ["ring", "ring_tdm_r1"]
