"""What each stage costs, charged to the role that spent it."""

import time

import pytest
import torch
from meeting import Meeting

from diffalign import Prompt
from diffalign.core import Ledger
from diffalign.core.ledger import peak_memory
from diffalign.testing import TinyPolicy


def spend(policy, rows):
    condition = policy.encode([Prompt("a")] * rows)
    with torch.no_grad():
        policy.velocity(torch.zeros(rows, 3), torch.full((rows,), 0.5), condition)


def test_rows_and_calls_are_charged_to_role_and_stage():
    ledger, policy = Ledger(), TinyPolicy()
    reference = policy.fork()
    spend(policy, 9)  # outside every stage
    roles = {"policy": policy, "reference": reference}
    with ledger.stage("rollout", roles):
        spend(policy, 2)
        spend(policy, 3)
    with ledger.stage("update", roles):
        spend(policy, 4)
        spend(reference, 1)
    with ledger.stage("update", roles):
        spend(policy, 4)
    assert ledger.rows == {"policy/rollout": 5, "policy/update": 8, "reference/update": 1}
    assert ledger.calls == {"policy/rollout": 2, "policy/update": 2, "reference/update": 1}


def test_one_counter_under_two_roles_is_charged_to_the_first():
    ledger, policy = Ledger(), TinyPolicy()
    with ledger.stage("rollout", {"policy": policy, "behavior": policy}):
        spend(policy, 2)
    assert ledger.rows == {"policy/rollout": 2}


def test_seconds_add_up_by_stage_and_need_no_role():
    ledger = Ledger()
    for _ in range(2):
        with ledger.stage("reward"):
            time.sleep(0.01)
    assert 0.02 <= ledger.seconds["reward"] < 1
    assert ledger.rows == {}


def test_a_stage_that_fails_is_charged_all_the_same():
    ledger, policy = Ledger(), TinyPolicy()

    def fail():
        with ledger.stage("update", {"policy": policy}):
            spend(policy, 2)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert ledger.rows == {"policy/update": 2}
    assert "update" in ledger.seconds


def test_rows_and_calls_are_those_of_all_processes_and_seconds_of_each():
    """A process may lack an entry: where prompts name their teacher, it may have the prompts of one alone."""
    mine = {
        0: Ledger(
            {"rollout": 1.0}, {"policy/rollout": 5, "one/update": 2}, {"policy/rollout": 2, "one/update": 1}, tracked={"one/update": 2}
        ),
        1: Ledger({"rollout": 3.0}, {"policy/rollout": 4, "two/update": 7}, {"policy/rollout": 1, "two/update": 1}),
    }
    found = Meeting().run(lambda devices: mine[devices.rank].over(devices))
    for rank in range(2):
        assert found[rank].rows == {"policy/rollout": 9, "one/update": 2, "two/update": 7}
        assert found[rank].calls == {"policy/rollout": 3, "one/update": 1, "two/update": 1}
        assert found[rank].tracked == {"policy/rollout": 0, "one/update": 2, "two/update": 0}
        assert found[rank].seconds == mine[rank].seconds
    assert mine[0].rows == {"policy/rollout": 5, "one/update": 2}
    nothing = Meeting().run(lambda devices: Ledger().over(devices))
    assert (nothing[0].rows, nothing[1].rows) == ({}, {})


def test_ledgers_add():
    ledger = Ledger({"a": 1.0}, {"p/a": 2}, {"p/a": 1})
    ledger.add(Ledger({"a": 0.5, "b": 2.0}, {"p/a": 3, "p/b": 1}, {"p/b": 1}))
    assert ledger == Ledger({"a": 1.5, "b": 2.0}, {"p/a": 5, "p/b": 1}, {"p/a": 1, "p/b": 1})


def test_peak_memory_is_that_of_a_process_with_torch_in_it():
    least = 0 if torch.cuda.is_available() else 2**26  # an accelerator counts its own memory, of which nothing is used here
    assert least <= peak_memory() < 2**40
