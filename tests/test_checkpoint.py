import errno
import hashlib
import json
import os
import shutil
import signal

import attrs
import pytest
import torch
from ring import ring_loop

from diffalign.core import Average, CheckpointError, Hook, SingleProcess
from diffalign.runs import snapshot
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints, load, read_manifest, save


def weights(loop):
    return [parameter.detach().clone() for parameter in loop.objective.policy.parameters()]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = ring_loop(average=Average(0.5))
    whole.run(6)
    first = ring_loop(tmp_path, [Checkpoints(tmp_path, every=3)], average=Average(0.5))
    first.run(3)
    second = ring_loop(tmp_path, [Checkpoints(tmp_path, every=3)], average=Average(0.5))
    start = second.hooks[0].restore(second)
    assert start == 3
    assert second.reward == first.reward
    second.run(6, start)
    for mine, other in zip(weights(second), weights(whole), strict=True):
        assert torch.equal(mine, other)
    averages = (loop.average.policy.parameters() for loop in (second, whole))
    assert all(torch.equal(mine, other) for mine, other in zip(*averages, strict=True))


@attrs.frozen
class FirstOfTwo(SingleProcess):
    """The process that writes; the other has a random generator of its own."""

    size: int = 2

    def gather(self, values):
        return torch.cat([values, torch.Generator().manual_seed(99).get_state()[None]])


@pytest.mark.parametrize(("devices", "seed"), [(SingleProcess(), 7), (FirstOfTwo(0), 7), (FirstOfTwo(1), 99)])
def test_every_process_goes_on_with_its_own_random_generator(tmp_path, devices, seed):
    loop = ring_loop(tmp_path)  # its parts draw from streams; one of somebody else may draw from torch
    loop.devices = FirstOfTwo()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save(loop, tmp_path / "step-000001", 1, "")
        torch.manual_seed(0)
        loop.devices = devices
        load(loop, tmp_path / "step-000001")
        assert torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(seed)))


def test_reference_is_the_one_of_the_first_start(tmp_path):
    first = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    reference = [parameter.clone() for parameter in first.objective.reference.parameters()]
    first.run(2)
    second = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    with torch.no_grad():
        second.objective.reference.means.add_(1.0)
    second.hooks[0].restore(second)
    assert all(torch.equal(mine, other) for mine, other in zip(second.objective.reference.parameters(), reference, strict=True))


def test_the_last_few_are_kept(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=1, keep=2)]).run(5)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000004", "step-000005"]


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, capsys):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(4)
    file = tmp_path / "step-000004" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="must have the content that its manifest names"):
        read_manifest(tmp_path / "step-000004")
    again = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    assert again.hooks[0].restore(again) == 2
    assert "skipping a damaged checkpoint" in capsys.readouterr().out


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000003.tmp")
    with pytest.raises(CheckpointError, match="there is none"):
        Checkpoints(tmp_path).restore(ring_loop())


def test_tensors_of_another_policy_are_refused(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=1)], average=Average()).run(1)
    manifest = json.loads((tmp_path / "step-000001" / "manifest.json").read_text())
    weights = {"policy.safetensors", "reference.safetensors", "average.safetensors"}
    assert {*weights, "policy.optimizer.pt", "state.pt"} == set(manifest["files"])
    other = ring_loop()
    other.objective.policy.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match="1 names differ \\(first: 'extra'\\)"):
        Checkpoints(tmp_path).restore(other)


class InterruptAt(Hook):
    def __init__(self, step):
        self.at = step

    def step(self, loop, report):
        if report.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_writes_a_checkpoint(tmp_path):
    loop = ring_loop(tmp_path, [InterruptAt(1), Checkpoints(tmp_path, every=100)])
    with pytest.raises(KeyboardInterrupt):
        loop.run(10)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002"]


def test_an_error_writes_none(tmp_path):
    loop = ring_loop(tmp_path, [Checkpoints(tmp_path, every=100)])
    with torch.no_grad():
        loop.objective.policy.means.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="rollout: latents are not finite at level"):
        loop.run(2)
    assert complete_checkpoints(tmp_path) == []


CONFIG = "objective:\n  class_path: SoftmaxTB\n  init_args:\n    beta: 4.0\n    rows: null\ntotal: 4\nfolder: runs/a\nchunk: 64\n"


def test_a_checkpoint_of_another_configuration_is_refused_with_the_difference(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2, config=CONFIG)]).run(2)
    loop = ring_loop()
    other = CONFIG.replace("4.0", "2.0").replace("total: 4", "total: 8\nseed: 1")
    message = (
        r"step-000002 has another configuration: objective.init_args.beta was 4.0, is now 2.0; total was 4, is now 8; "
        r"seed was -, is now 1. Give the same values or another folder \(a new total is accepted with --new-total\)."
    )
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, config=other).resume(loop)
    surroundings = CONFIG.replace("null", "7").replace("runs/a", "runs/b").replace("chunk: 64", "chunk: 2\nhooks: [my.Hook]\ntrackers: x")
    assert Checkpoints(tmp_path, config=surroundings).resume(loop) == 2
    with pytest.raises(CheckpointError, match=r"total was 4, is now 8. Give"):
        Checkpoints(tmp_path, config=CONFIG.replace("total: 4", "total: 8")).resume(loop)
    assert Checkpoints(tmp_path, config=CONFIG.replace("total: 4", "total: 8")).resume(loop, new_total=True) == 2


def test_the_best_is_kept_by_its_reward(tmp_path):
    rewards = iter([0.1, 0.2, 0.8, 0.9, 0.3, 0.4])

    class Given(Hook):
        def step(self, loop, report):
            report.metrics["reward"] = next(rewards)

    ring_loop(tmp_path, [Given(), Checkpoints(tmp_path, every=2, keep=1)]).run(6)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000006"]
    best = read_manifest(tmp_path / "best")
    assert (best["step"], best["score"]) == (4, pytest.approx(0.85))
    loop = ring_loop()
    assert load(loop, tmp_path / "best") == 4


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    saved = snapshot.save_file

    def full(tensors, file):
        if "step-000004" in str(file):
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(tensors, file)

    monkeypatch.setattr(snapshot, "save_file", full)
    loop = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    with pytest.raises(CheckpointError, match=r"step-000004 cannot be written: .*No space left on device. .* good one is .*step-000002;"):
        loop.run(6)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000002", "best"}
    monkeypatch.setattr(snapshot, "save_file", saved)
    again = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    again.run(6, again.hooks[0].restore(again))
    whole = ring_loop()
    whole.run(6)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(again), weights(whole), strict=True))


def test_a_checkpoint_that_lacks_only_its_name_is_given_it(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(4)
    (tmp_path / "step-000004").rename(tmp_path / "step-000004.tmp")
    assert Checkpoints(tmp_path).restore(ring_loop()) == 4
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002", "step-000004"]


def test_who_only_reads_renames_nothing(tmp_path, monkeypatch):
    """While the run waits for the disk, its next checkpoint is complete and has its temporary name."""
    seen, publish = [], snapshot.publish

    def slow(temporary, folder):
        seen.append([path.name for path in complete_checkpoints(folder.parent)])
        publish(temporary, folder)

    monkeypatch.setattr(snapshot, "publish", slow)
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=1)]).run(2)
    assert seen == [[], ["step-000001"]]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=1)]).run(2)
    digest = snapshot._digest

    def pruned(file):
        shutil.rmtree(tmp_path / "step-000001", ignore_errors=True)
        return digest(file)

    monkeypatch.setattr(snapshot, "_digest", pruned)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002"]
    assert capsys.readouterr().out == ""


def test_what_a_crash_left_is_cleared_and_a_damaged_one_is_not_counted(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(4)
    (tmp_path / "step-000004" / "state.pt").unlink()
    (tmp_path / "step-000006.tmp").mkdir()
    again = ring_loop(tmp_path, [Checkpoints(tmp_path, every=1, keep=1)])
    again.run(3, again.hooks[0].restore(again))
    assert {path.name for path in tmp_path.iterdir()} == {"step-000003", "best"}


def test_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(4)
    with pytest.raises(CheckpointError, match="must hold no checkpoint after step 0, at which this run starts; it has step-000004"):
        ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(4)


def test_no_pickle_is_trusted(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(2)
    folder = tmp_path / "step-000002"
    torch.save({"parts": {"objective": Evil()}}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state.pt must hold only tensors and plain values"):
        Checkpoints(tmp_path).restore(ring_loop())
    assert not (tmp_path / "owned").exists()


class AbortAt(Hook):
    def step(self, loop, report):
        raise KeyboardInterrupt  # the second Ctrl-C


def test_a_second_signal_keeps_the_last_finished_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ring_loop(tmp_path, [AbortAt(), Checkpoints(tmp_path, every=100)]).run(3)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001"]


def test_of_several_processes_none_writes_at_a_second_signal(tmp_path):
    hook, loop = Checkpoints(tmp_path, every=100), ring_loop(tmp_path)
    loop.devices = FirstOfTwo()
    hook.start(loop, 0, 3)
    hook.stop(loop, 1, KeyboardInterrupt())
    assert complete_checkpoints(tmp_path) == []
