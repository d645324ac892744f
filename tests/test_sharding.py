"""Full fine-tuning with sharded weights on two processes against one; checkpoints, undo, and memory that runs out in one of them."""

import re
import time
from pathlib import Path

import full_processes
import pytest
import torch
import two_processes
from started import start_two

from diffalign import config
from diffalign.core import SingleProcess
from diffalign.runs.checkpoints import complete_checkpoints, load

HERE = Path(__file__).parent
EQUAL = ("tmpo", "sharded-tmpo", "sharded-recomputed", "sharded-tdm_r1")
RUN = """
policy:
  class_path: NetworkPolicy
  init_args: {network: {class_path: full_processes.Blocks, init_args: {width: 4000}}, latent_shape: [3], decode: full_processes.pixel}
objective: {class_path: SoftmaxTB, init_args: {rows: 3}}
sampler: {class_path: TreeSampler, init_args: {steps: 5, rows: 5, plan: {class_path: FixedPlan, init_args: {splits: [1, 2]}}}}
rewards: diffalign.testing.doubles.channel_reward
prompts: {class_path: Prompts, init_args: {prompts: [a, b, c]}}
prompts_per_step: 3
checkpoint_every: 1
total: 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    done = start_two(HERE / "full_processes.py", path, *EQUAL, "sharded-resumed", "sharded-undone", "sharded-no_room_to_decode")
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings in this process."""
    return two_processes.trained_alone(full_processes.train, tmp_path_factory.mktemp("one"))


def close(weights, expected):
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_fine_tune_all_weights_as_one(folder, alone, case):
    name = case.removeprefix("sharded-")
    expected = alone["tmpo" if name == "recomputed" else name]["weights"]
    results = [torch.load(folder / case / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        close(result["weights"], expected)
    spread = case.startswith("sharded")
    assert [result["spread"] == len(expected) for result in results] == [spread, spread]
    if spread:  # every role's weights, and the optimizers' state, once over both
        trained = {"tdm_r1": ("generator", "fake", "surrogate")}.get(name, ("policy",))
        moments = 2 * sum(value.numel() for key, value in expected.items() if key.split(".")[0] in trained)
        assert sum(result["here"] for result in results) == sum(value.numel() for value in expected.values())
        assert sum(result["state"] for result in results) == moments
        assert max(result["here"] for result in results) < 0.6 * sum(value.numel() for value in expected.values())
        assert not results[0]["moved"].get("sum_gradients")  # fully_shard sums them itself
        assert results[0]["calls"] == results[1]["calls"] > 0


def test_a_checkpoint_does_not_know_whether_its_run_was_sharded(folder):
    place = folder / "sharded-resumed"
    saved = {name: torch.load(place / f"{name}-0.pt", weights_only=True) for name in ("unbroken", "sharded", "whole", "spread")}
    assert all(torch.equal(saved["sharded"][key], value) for key, value in saved["unbroken"].items())
    close(saved["whole"], saved["unbroken"])
    close(saved["spread"], saved["unbroken"])
    two_processes.SETTINGS.update(devices=SingleProcess(), sharding=None)
    loop = full_processes.tmpo()
    assert load(loop, place / "sharded" / "step-000002") == 2
    written = full_processes.weights(loop)
    assert all(torch.equal(written[key], value) for key, value in saved["sharded"].items())
    loop.run(3, 2)


def test_a_failed_update_is_undone_in_both(folder):
    for rank in range(2):
        facts = torch.load(folder / "sharded-undone" / f"undone-{rank}.pt", weights_only=True)
        assert all(torch.equal(facts["after"][key], value) for key, value in facts["before"].items())
        assert facts["state"]
        assert any(not torch.equal(facts["again"][key], value) for key, value in facts["before"].items())
    first, second = said(folder, "sharded-undone")
    assert second.startswith("NonFiniteError: role 'policy', step 1: loss is nan.")
    assert first == second.replace("NonFiniteError: ", "NonFiniteError: process 1 of 2: ")


def said(folder, case):
    return [(folder / case / f"said-{rank}").read_text() for rank in range(2)]


def test_no_memory_to_decode_in_one_process_ends_both_with_advice(folder):
    for text in said(folder, "sharded-no_room_to_decode"):
        assert text.startswith("OutOfMemoryError: ")
        assert "process" in text.splitlines()[0] or "no memory" in text.splitlines()[0]
        assert "Continue by --resume with a smaller --chunk" in text


INSIDE = [("rollout", 34, "a call of"), ("update", 4, "a call of"), ("backward", 4, "the backward pass")]


@pytest.mark.parametrize(("fails", "after", "where"), INSIDE)
def test_no_memory_inside_a_collective_ends_both_within_a_minute(tmp_path, fails, after, where):
    (tmp_path / "run.yaml").write_text(RUN)
    network = "--policy.network"
    options = [f"{network}.fails", fails, f"{network}.after", str(after), "--folder", str(tmp_path / "run")]
    done = start_two("-m", "diffalign", "train", tmp_path / "run.yaml", "--shard", *options)
    failed = float(re.findall(r"failed at ([\d.]+)", done.stderr)[0])
    assert time.time() - failed < 60
    assert done.returncode != 0
    assert f"error: process 1 of 2 ran out of memory in {where}" in done.stderr
    assert "Continue by --resume with smaller --sampler.rows (rollout) and --objective.rows (update)" in done.stderr
    assert "error: process 0 of 2 failed in " in done.stderr
    assert "look for its message, and continue by --resume" in done.stderr
    saved = complete_checkpoints(tmp_path / "run", quiet=True)
    loop = config.parse(tmp_path / "run.yaml").build()
    assert load(loop, saved[-1]) == int(saved[-1].name.removeprefix("step-")) > 0
