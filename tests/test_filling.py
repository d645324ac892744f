"""Row budgets that fill the memory of a device, on a device that is only counted."""

import attrs
import pytest
import torch

from diffalign import AlignmentLoop, Hook
from diffalign.core import Ledger, SingleProcess
from diffalign.core.memory import current_memory
from diffalign.costs import filling
from diffalign.costs.filling import Filling
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.runs.recording import Recorder
from diffalign.runs.snapshot import load, save
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

WEIGHTS, PLAIN, GRADIENT, IMAGE = 100, 10, 40, 30
"""Bytes: of the weights, of a row without and with gradient, and of a decoded image."""


@attrs.define
class Counted:
    """Memory of a device on which nothing but rows takes memory."""

    capacity: int
    most: int = WEIGHTS

    def begin(self):
        self.most = WEIGHTS

    def used(self):
        return WEIGHTS

    def peak(self):
        return self.most

    highest = peak

    def free(self):
        return self.capacity - WEIGHTS

    def take(self, count):
        if WEIGHTS + count > self.capacity:
            raise torch.OutOfMemoryError(f"{count} bytes")
        self.most = max(self.most, WEIGHTS + count)


class Rows(TinyPolicy):
    memory: Counted

    def velocity(self, latents, sigma, condition):
        velocity = super().velocity(latents, sigma, condition)
        self.memory.take(len(latents) * (GRADIENT if torch.is_grad_enabled() else PLAIN))
        return velocity

    def decode(self, latents):
        self.memory.take(len(latents) * IMAGE)
        return super().decode(latents)


@pytest.fixture
def build(monkeypatch):
    def build(capacity, rows=None, prompts=6, guess=0, **options):
        memory = Counted(capacity)
        monkeypatch.setattr("diffalign.core.ledger.current_memory", lambda: memory)
        monkeypatch.setattr(Rows, "memory", memory, raising=False)
        monkeypatch.setattr(filling, "activation_bytes", lambda policy: guess)
        tree = TreeSampler(5, FixedPlan(splits=(1, 2)), rows=rows)
        return AlignmentLoop(
            SoftmaxTB(Rows(), rows=rows),
            tree,
            channel_reward,
            Prompts(["a", "b"]),
            prompts_per_step=prompts,
            check_rows=0,
            hooks=(Filling(),),
            **options,
        )

    return build


def budgets(loop, steps):
    found = []

    class Note(Hook):
        def step(self, loop, report):
            found.append((loop.sampler.rows, loop.objective.rows, loop.chunk, report.ledger.usage, report.ledger.predicted))

    loop.advance(steps, also=(Note(),))
    return found


def test_budgets_grow_to_what_fits_and_stay(build):
    loop = build(capacity=WEIGHTS + 1000, prompts=6)  # calls of 6, 18 and 54 rows, an update of 24, 54 images
    found = budgets(loop, 4)
    share = 0.85 * 1000
    assert [entry[:3] for entry in found] == [(16, 16, 16), (64, int(share / GRADIENT), int(share / IMAGE)), *[(64, 21, 28)] * 2]
    assert {entry[:3] for entry in budgets(loop, 2)} == {(64, 21, 28)}  # of another run of the loop


def test_what_is_given_stays(build):
    loop = build(capacity=WEIGHTS + 1000, rows=3, chunk=5)
    assert {entry[:3] for entry in budgets(loop, 3)} == {(3, 3, 5)}


def test_memory_that_runs_out_halves_a_budget_which_then_stays(build, monkeypatch, capsys):
    loop = build(capacity=WEIGHTS + 1000)
    take = loop.objective.policy.memory.take
    monkeypatch.setattr(Counted, "take", lambda memory, count: take(count) if count <= 15 * GRADIENT else _none_left(count))
    found = budgets(loop, 4)
    assert {entry[1] for entry in found[1:]} == {8}
    assert "out of memory after calls of up to 16 rows: objective.rows is 8" in capsys.readouterr().err


def _none_left(count):
    raise torch.OutOfMemoryError(f"fragments: {count}")


def test_the_peak_is_foretold(build):
    found = budgets(build(capacity=WEIGHTS + 1000), 3)
    assert [set(entry[4]) for entry in found] == [set(), *[{"rollout", "update", "decode"}] * 2]
    for *_, usage, predicted in found[1:]:
        assert {stage: usage[stage].peak for stage in predicted} == predicted


def test_a_device_on_which_one_row_does_not_fit(build):
    with pytest.raises(torch.OutOfMemoryError, match=r"One network row of the update does not fit .* Try --policy.checkpointing"):
        budgets(build(capacity=WEIGHTS + 35), 1)


def test_too_large_a_row_is_foretold(build, capsys):
    loop = build(capacity=WEIGHTS + 1000, guess=2000)
    assert budgets(loop, 1)[0][:2] == (4, 4)
    assert "one row of the update needs about 2 KiB for its activations, and 1000 B are free" in capsys.readouterr().err


def test_the_first_rows_follow_the_planners_estimate(build):
    loop = build(capacity=WEIGHTS + 1000, guess=70)
    first = []
    loop.hooks = (*loop.hooks, Noting(first))
    loop.advance(1)
    assert first == [(3, 3, 3)]


class Noting(Hook):
    def __init__(self, found):
        self.found = found

    def start(self, loop, step, total):
        self.found.append((loop.sampler.rows, loop.objective.rows, loop.chunk))


class Two(SingleProcess):
    """Two processes, of which the other has less memory."""

    def maximum(self, values):
        if values.shape == (2, 3):
            return torch.maximum(values, torch.tensor([[-12, -11, -10], [0, 0, 0]]))
        return values


def test_all_processes_take_the_rows_of_the_fullest_device(build):
    loop = build(capacity=WEIGHTS + 1000, prompts=6, devices=Two())
    assert budgets(loop, 2)[1][:3] == (12, 11, 10)


def test_without_an_accelerator_nothing_changes(build, monkeypatch):
    loop = build(capacity=WEIGHTS + 10**6)
    monkeypatch.setattr("diffalign.core.ledger.current_memory", current_memory)
    loop.ledger = Ledger()
    if loop.ledger.memory is None:
        assert {entry[:3] for entry in budgets(loop, 2)} == {(None, None, 64)}


def test_a_resumed_run_keeps_what_it_had_found(build, tmp_path):
    loop = build(capacity=WEIGHTS + 1000)
    loop.advance(2)
    found = loop.sampler.rows, loop.objective.rows, loop.chunk
    save(loop, tmp_path / "step-000002", 2, "")
    again = build(capacity=WEIGHTS + 1000)
    load(again, tmp_path / "step-000002")
    assert (again.sampler.rows, again.objective.rows, again.chunk) == found == (64, 21, 28)
    assert {entry[:3] for entry in budgets(again, 2)} == {found}
    given = build(capacity=WEIGHTS + 1000, rows=3, chunk=5)
    load(given, tmp_path / "step-000002")
    assert (given.sampler.rows, given.objective.rows, given.chunk) == (3, 3, 5)


def test_metrics_hold_seen_and_foretold_memory(build, tmp_path):
    loop = build(capacity=WEIGHTS + 1000)
    loop.hooks = (*loop.hooks, Recorder(tmp_path))
    loop.advance(2)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"memory/update_bytes": 260' in lines[0]
    assert '"memory/update_predicted_bytes": 740' in lines[1]
    assert '"memory/update_bytes": 740' in lines[1]
