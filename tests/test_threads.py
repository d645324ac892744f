"""How many threads the programs take, and whom they leave alone."""

import os

import pytest
import torch
from ring import ring_loop

from diffalign.cli import main
from diffalign.core import Prompt
from diffalign.rewards.worker import WorkerReward
from diffalign.threads import fair_threads, take_fair_threads, usable_cores

RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {class_path: FixedPlan, init_args: {splits: [1, 2], branches: 2, eta: 0.5}}}}
rewards: thread_rewards.red
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
prompts_per_step: 1
total: 1
"""
REWARDS = """
import os

def red(images, prompts):
    return images.flatten(1).mean(dim=1)

def threads(images, prompts):
    return [float(os.environ["OMP_NUM_THREADS"])] * len(images)
"""


@pytest.fixture
def taken(monkeypatch):
    """What torch is told on a machine of twelve cores, on which it would take sixteen threads."""
    numbers = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr("diffalign.threads.usable_cores", lambda: 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "thread_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("accelerated", "cores", "environment", "expected"),
    [
        (True, 16, {}, 4),
        (True, 2, {}, 2),
        (True, 16, {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "32"}, 2),
        (True, 4, {"LOCAL_WORLD_SIZE": "8"}, 1),
        (False, 16, {}, 16),
        (False, 16, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, 8),
        (False, 16, {"WORLD_SIZE": "4"}, 4),
        (False, 16, {"OMP_NUM_THREADS": ""}, 16),
        (True, 16, {"OMP_NUM_THREADS": "12"}, None),
        (False, 16, {"MKL_NUM_THREADS": "12", "WORLD_SIZE": "4"}, None),
    ],
)
def test_few_beside_an_accelerator_and_a_share_on_a_cpu(accelerated, cores, environment, expected):
    assert fair_threads(accelerated, cores, environment) == expected


def test_cores_are_those_that_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


def test_the_device_decides(taken, monkeypatch):
    for device in ("cuda", "cpu"):
        take_fair_threads(torch.device(device))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # of hyperthreads, or by a program's own choice
    take_fair_threads(torch.device("cpu"))
    assert taken == [4, 12, 3]


def test_what_the_user_has_set_stays(taken, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    take_fair_threads(torch.device("cuda"))
    assert not taken


@pytest.mark.parametrize(
    "command",
    [
        ["train", "toy.yaml"],
        ["sample", "toy.yaml", "--prompt", "one", "--n", "2", "--steps", "2", "--out", "out.png"],
        ["evaluate", "toy.yaml", "--prompts", "prompts.txt"],
    ],
    ids=lambda command: command[0],
)
def test_programs_take_their_share(workplace, taken, monkeypatch, command):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main(command) == 0
    assert taken == [3]


def test_comparing_takes_it_for_each_run(workplace, taken):
    (workplace / "other.yaml").write_text(RUN)
    assert main(["compare", "toy.yaml", "other.yaml", "--prompts", "prompts.txt"]) == 0
    assert taken == [12, 12]


def test_a_loop_of_a_users_own_changes_nothing(tmp_path, taken):
    ring_loop(tmp_path).run(1)
    assert not taken


@pytest.mark.parametrize(("accelerator", "environment", "expected"), [(True, {}, 4), (False, {}, 12), (True, {"OMP_NUM_THREADS": "9"}, 9)])
def test_a_worker_does_not_take_the_machine(workplace, taken, monkeypatch, accelerator, environment, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    reward = WorkerReward("thread_rewards:threads", environment=environment)
    assert reward(torch.zeros(1, 3, 2, 2), [Prompt("one")]).tolist() == [expected]
    reward.close()
