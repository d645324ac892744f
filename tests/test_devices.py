"""Two processes against one, and what happens to both when something happens to one. Each start of processes serves many cases."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_processes
from started import start_two
from torch import nn
from torchrun import launch

from diffalign.core import SingleProcess
from diffalign.processes import devices
from diffalign.processes.devices import connect, described

HERE = Path(__file__).parent
EQUAL = ("tmpo", "tdm_r1", "distilled", "sharded-tmpo", "sharded-recomputed", "sharded-tdm_r1", "sharded-distilled")
FAULTS = (
    "nan_reward",
    "nan_weight",
    "full_disk",
    "small_memory",
    "stops",
    "sharded-nan_reward",
    "sharded-nan_weight",
    "held_out",
    "sharded-held_out",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    done = start_two(HERE / "two_processes.py", path, *EQUAL, *FAULTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings in this process."""
    return two_processes.trained_alone(two_processes.train, tmp_path_factory.mktemp("one"), ("tmpo", "tdm_r1", "distilled"))


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_train_the_weights_of_one(folder, alone, case):
    name = case.removeprefix("sharded-")
    expected = alone["tmpo" if name == "recomputed" else name]
    for rank in range(2):
        result = torch.load(folder / case / f"{name}-{rank}.pt", weights_only=True)
        for key, value in expected["weights"].items():
            torch.testing.assert_close(result["weights"][key], value, rtol=1e-6, atol=1e-6, msg=key)
        assert result["reward"] == pytest.approx(expected["reward"], abs=1e-6)
        # 3 prompts over 2 processes: the one with fewer makes the calls of the other
        assert bool(result["sharded"]) == bool(result["padded"]) == case.startswith("sharded")


@pytest.mark.parametrize("case", EQUAL)
def test_the_rows_of_a_step_are_those_of_both_and_its_utilisation_that_of_one(folder, alone, case):
    name = case.removeprefix("sharded-")
    expected = alone["tmpo" if name == "recomputed" else name]["rows"]
    assert min(expected) > 0
    for rank in range(2):
        result = torch.load(folder / case / f"{name}-{rank}.pt", weights_only=True)
        assert result["rows"] == expected
        assert result["own"] == [rows / 2 for rows in expected]


def test_a_phase_moves_the_gradients_of_its_role_once(folder):
    result = torch.load(folder / "tmpo" / "tmpo-0.pt", weights_only=True)
    own = sum(value.numel() * 4 for key, value in result["weights"].items() if key.startswith("policy."))
    tensors = 2  # beside the gradients, one byte for each: whether anybody has it
    assert result["moved"]["sum_gradients"] == 5 * 2 * (own + tensors)  # steps, updates


def said(folder, case):
    return [(folder / case / f"said-{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("case", ["nan_reward", "sharded-nan_reward"])
def test_a_reward_that_is_not_finite_in_one_process_stops_both(folder, case):
    first, second = said(folder, case)
    assert second.startswith("NonFiniteRewardError: reward returned nan for image 0 of ")
    assert first == second.replace("NonFiniteRewardError: ", "NonFiniteRewardError: process 1 of 2: ")
    same_weights(folder, case)


@pytest.mark.parametrize("case", ["held_out", "sharded-held_out"])
def test_a_reward_of_an_evaluation_that_fails_in_one_process_stops_both(folder, case):
    first, second = said(folder, case)
    place = "RewardError: in the evaluation at step 2, HeldOutEvaluation: "
    assert second.startswith(f"{place}reward 'odd' raised ValueError for 2 images: no licence")
    assert first == second.replace(place, f"{place}process 1 of 2: ")
    same_weights(folder, case)
    one, other = (torch.load(folder / case / f"before-{rank}.pt", weights_only=True) for rank in range(2))
    assert one.shape == (5, 2)
    assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["nan_weight", "sharded-nan_weight"])
def test_latents_that_are_not_finite_in_one_process_stop_both(folder, case):
    first, second = said(folder, case)
    assert second.startswith("NonFiniteError: role 'policy', step 2, rollout: latents are not finite at level 1")
    assert first == second.replace("NonFiniteError: ", "NonFiniteError: process 1 of 2: ")


def same_weights(folder, case):
    one, other = (torch.load(folder / case / f"weights-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_full_disk_of_the_first_stops_both(folder):
    assert said(folder, "full_disk") == [
        "OSError: No space left on device",
        "OSError: process 0 of 2: No space left on device",
    ]
    same_weights(folder, "full_disk")


def test_a_signal_to_one_stops_both_after_the_same_step_with_a_checkpoint(folder):
    assert said(folder, "stops") == ["SIGTERM", "SIGTERM"]
    assert [path.name for path in (folder / "stops").glob("step-*")] == ["step-000002"]


def test_a_process_out_of_memory_halves_the_rows_of_both(folder):
    results = [torch.load(folder / "small_memory" / f"small-{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0]["rows"] == results[1]["rows"] == (4, None)
    assert all(torch.equal(results[0]["weights"][key], results[1]["weights"][key]) for key in results[0]["weights"])


def test_a_process_that_dies_ends_the_other_with_a_message_within_a_minute(tmp_path):
    start = time.monotonic()
    done = launch(HERE / "two_processes.py", tmp_path, "dies")
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    message = (tmp_path / "dies" / "said-0").read_text()
    assert message.startswith("ProcessError: process 0 of 2 lost contact with another process in ")
    assert "continue by --resume" in message


def test_gradients_are_summed_in_pieces_that_need_little_memory(monkeypatch):
    summed = []

    def twice(values, how):
        if values.is_floating_point():
            summed.append(values.numel())
            values.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", twice)
    monkeypatch.setattr(devices, "_BUCKET", 4 * 10)
    sizes = (4, 5, 3, 40, 2)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes] + [nn.Parameter(torch.zeros(7))]
    for place, (parameter, size) in enumerate(zip(parameters, sizes, strict=False)):
        parameter.grad = torch.arange(size) + 10.0 * place
    before = [parameter.grad.clone() for parameter in parameters[:-1]]
    devices.TorchDevices(0, 2, torch.device("cpu"), "gloo").sum_gradients(parameters)
    assert summed == [4 + 5, 3, 40, 2]  # a gradient is never cut
    assert all(torch.equal(parameter.grad, 2 * mine) for parameter, mine in zip(parameters, before, strict=False))
    assert parameters[-1].grad is None  # no process has it


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert connect() == SingleProcess()
    assert described(SingleProcess(), 4) == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert described(SingleProcess(), 4).startswith("1 process: on a CPU accelerate launch starts only one")
