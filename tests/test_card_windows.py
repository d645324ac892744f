"""What a card says that training changed: means over two stretches of the run that do not meet."""

import json

import pytest

from diffalign.export.card import _trained


def written(folder, steps):
    lines = [json.dumps({"step": step, "reward": float(step), "loss": 0.0}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return _trained(folder, None)


@pytest.mark.parametrize(
    ("steps", "count", "before", "after"),
    [(2, 1, 0.0, 1.0), (3, 1, 0.0, 2.0), (10, 5, 2.0, 7.0), (19, 9, 4.0, 14.0), (20, 10, 4.5, 14.5), (50, 10, 4.5, 44.5)],
)
def test_before_and_after_are_means_of_other_steps(tmp_path, steps, count, before, after):
    rows, source = written(tmp_path, steps)
    assert rows == (("reward", f"{before:.4f}", f"{after:.4f}"),)
    assert source == f"while training, means over the first and the last {count} steps; not held out"


def test_a_single_step_has_no_before(tmp_path):
    assert written(tmp_path, 1) == ((), "")
