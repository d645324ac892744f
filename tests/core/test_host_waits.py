"""Waits of the host for the device: counted by what torch warns of, by stage, at few steps."""

import time
import warnings

import pytest
import torch
from ring import ring_loop

from diffalign.core import Ledger, Overlapped, Progress
from diffalign.core.host_waits import CudaWaits, waits_at


@pytest.fixture
def cuda(monkeypatch):
    """Modes of a CUDA device that was never there, in the order in which they were set."""
    modes = ["default"]
    monkeypatch.setattr("diffalign.core.ledger.current_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: ("default", "warn", "error").index(modes[-1]))
    return modes


def wait(modes):
    """Do what `.item()` does there."""
    if modes[-1] == "warn":
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:151.)", UserWarning, stacklevel=1)


def test_waits_are_counted_by_stage(cuda):
    ledger = Ledger(memory=None, waiting=CudaWaits())
    wait(cuda)  # outside every stage
    with ledger.stage("rollout"):
        for _ in range(3):
            wait(cuda)  # the same line each time
    for _ in range(2):
        with ledger.stage("update"):
            wait(cuda)
    assert ledger.waits == {"rollout": 3, "update": 2}
    assert cuda[-1] == "default"
    total = Ledger(memory=None)
    total.add(ledger)
    total.add(ledger)
    assert total.waits == {"rollout": 6, "update": 4}


def test_a_stage_that_fails_leaves_the_mode_as_it_was(cuda):
    ledger = Ledger(memory=None, waiting=CudaWaits())

    def fail():
        with ledger.stage("update"):
            wait(cuda)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (ledger.waits, cuda[-1], ledger.failed) == ({"update": 1}, "default", "update")


def test_other_warnings_are_shown_and_torchs_own_are_not(cuda):
    def score():
        with Ledger(memory=None, waiting=CudaWaits()).stage("reward"):
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", UserWarning, stacklevel=1)
            wait(cuda)
            warnings.warn("the judge is old", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="the judge is old") as shown:
        score()
    assert [str(one.message) for one in shown] == ["the judge is old"]


def test_a_mode_that_somebody_set_stays(cuda):
    cuda.append("error")
    ledger = Ledger(memory=None, waiting=CudaWaits())
    with ledger.stage("update"):
        pass
    assert (ledger.waits, cuda) == ({"update": 0}, ["default", "error"])


def test_one_step_of_a_hundred_counts(cuda):
    assert [step for step in range(250) if waits_at(step) is not None] == [2, 102, 202]
    assert isinstance(Ledger.of(2).waiting, CudaWaits)


def test_without_a_device_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert waits_at(2) is None


def test_nothing_is_counted_while_threads_score(cuda):
    """Warnings belong to all threads: a reward that changes their filters in another thread must find and leave them as they are."""
    ledger = Ledger(memory=None, waiting=CudaWaits())
    with ledger.uncounted(), ledger.stage("rollout"):
        wait(cuda)
    with ledger.stage("update"):
        wait(cuda)
    assert ledger.waits == {"update": 1}


def test_overlapped_rewards_keep_the_warnings_of_the_process(cuda):
    def quiet(images, prompts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            time.sleep(0.01)
            return images.flatten(1).mean(dim=1)

    left = ("ignore", None, Warning, None, 0)
    assert left not in warnings.filters
    loop = ring_loop(rollout=Overlapped(prompts=1))
    loop._rewards = {"quiet": quiet}
    for _ in range(5):
        loop._attempt(loop.prompts.draw(2, 2), Progress(2, 4), Ledger(memory=None, waiting=CudaWaits()))
    assert left not in warnings.filters
