"""Rewards in a process of their own: the same numbers, and an error with its cause for whatever goes wrong there."""

import os
import re
import signal
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import torch

from diffalign.core import Prompt, RewardError
from diffalign.rewards.worker import WorkerReward
from diffalign.rewards.worker_program import WorkerPrompt
from diffalign.threads import of_child

PARTS = """
import os, signal, sys, time

def bright(images, prompts):
    print("a reward may print")
    return images.mean(dim=(1, 2, 3)) + sum(prompts[0].metadata["n"])

class Ranked:
    def of_groups(self, images, prompts, group):
        return group

    def __call__(self, images, prompts):
        return self.of_groups(images, prompts, [0.0] * len(images))


ranked = Ranked()


class Stepped:
    def of_step(self, images, prompts, group, progress):
        return [float(progress.step)] * len(images)

    def __call__(self, images, prompts):
        return [0.0] * len(images)


class Partial:
    def __init__(self, values, applies):
        self.values, self.applies = values, applies


class Faulty:
    def __init__(self, start=None):
        if start is not None:
            raise FileNotFoundError(start)

    def __call__(self, images, prompts):
        return getattr(self, prompts[0])(images, prompts)

    def where(self, images, prompts):
        return [float("diffalign" in sys.modules), float(type(prompts[0]).__name__ == "WorkerPrompt")]

    def flood(self, images, prompts):
        os.write(1, b"x" * 300_000 + b"\\n")
        return [1.0] * len(images)

    def raises(self, images, prompts):
        raise KeyError("no such word")

    def ends(self, images, prompts):
        print("the last words", file=sys.stderr)
        sys.stderr.flush()
        os._exit(7)

    def killed(self, images, prompts):
        if os.fork() == 0:  # a child that outlives it
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    def parent(self, images, prompts):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        return [float(child)] * len(images)

    def sleeps(self, images, prompts):
        time.sleep(60)

    def nan(self, images, prompts):
        return [1.0, float("nan")]

    def few(self, images, prompts):
        return [1.0]

    def nested(self, images, prompts):
        return images.mean(dim=(2, 3))

    def full(self, images, prompts):
        if len(images) > 1:
            raise MemoryError("one at a time")
        return [len(prompts[0])]

    def fuller(self, images, prompts):
        raise MemoryError("not even one")

    def prompted(self, images, prompts):
        return [len(prompt.source or "") + 10.0 * sum(prompt.size or ()) for prompt in prompts]

    def partial(self, images, prompts):
        return Partial(images.mean(dim=(1, 2, 3)), [prompt.metadata.get("applies", True) for prompt in prompts])

    def unequal(self, images, prompts):
        return Partial([1.0, 2.0], [True])

    def pid(self, images, prompts):
        return [float(os.getpid())] * len(images)
"""
IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "worker"
    folder.mkdir(exist_ok=True)
    (folder / "worker_parts.py").write_text(PARTS)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "worker"
    folder.mkdir(exist_ok=True)
    (folder / "worker_parts.py").write_text(PARTS)
    before = Path.cwd()
    os.chdir(folder)
    reward = WorkerReward("worker_parts:Faulty", timeout=20.0)
    os.chdir(before)
    yield reward
    reward.close()


def ask(reward, word):
    return reward(IMAGES, [Prompt(word), Prompt(word)])


def test_another_interpreter_without_the_package_gives_the_same_numbers(tmp_path):
    venv.create(tmp_path / "other", with_pip=False)
    reward = WorkerReward(
        "worker_parts:bright",
        python=str(tmp_path / "other" / "bin" / "python"),
        environment={"PYTHONPATH": sysconfig.get_path("purelib")},  # torch, but no .pth file of an editable install is read there
    )
    prompts = [Prompt("a", {"n": [1, 2]}), Prompt("b")]
    assert torch.equal(reward(IMAGES, prompts), IMAGES.mean(dim=(1, 2, 3)) + 3)
    (process,) = (one._running for one in reward._processes)
    reward.close()
    assert process.poll() is not None


def test_the_program_does_not_import_the_package(faulty):
    assert ask(faulty, "where").tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("raises", "worker_parts:Faulty raised KeyError: 'no such word'"),
        ("nan", "returned nan for image 1 of 2, prompt 'nan'"),
        ("few", "returned 1 scores for 2 images"),
        ("nested", "raised TypeError"),
        ("unequal", "raised ValueError: values and applies must be equally many; got 2 and 1"),
        ("fuller", "memory ran out for a single image of 4 x 4"),
    ],
)
def test_a_failure_that_the_process_survives(faulty, word, message):
    before = ask(faulty, "pid").tolist()
    with pytest.raises(RewardError) as caught:
        ask(faulty, word)
    assert message in str(caught.value)
    assert ask(faulty, "pid").tolist() == before


PROMPTED = [Prompt("prompted", {"height": 8, "width": 6}, "likes"), Prompt("prompted", {}, "counts"), Prompt("prompted")]


def test_a_reward_without_the_package_reads_the_source_and_the_size_of_a_prompt(faulty):
    assert faulty(torch.zeros(3, 3, 4, 4), PROMPTED).tolist() == [145.0, 6.0, 0.0]


@pytest.mark.parametrize("metadata", [{}, {"height": 8, "width": 6}, {"height": 8}, {"height": 8, "width": 0}, {"height": 8, "width": "6"}])
def test_a_prompt_without_the_package_has_the_size_of_the_packages_own(metadata):
    own, other = Prompt("a", metadata), WorkerPrompt("a")
    other.metadata = metadata
    try:
        expected = own.size
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            _ = other.size
    else:
        assert other.size == expected


def test_a_reward_without_the_package_need_not_apply_to_every_picture(faulty):
    scores = faulty(IMAGES, [Prompt("partial"), Prompt("partial", {"applies": False})])
    assert scores.applies.tolist() == [True, False]
    assert scores.scores.tolist() == [IMAGES[0].mean().item()]
    assert torch.equal(ask(faulty, "partial"), IMAGES.mean(dim=(1, 2, 3)))  # it applies to both


def test_a_reward_of_the_package_is_the_same_in_a_worker(folder):
    (folder / "packaged.py").write_text(
        "from diffalign.core import Partial\n\n\n"
        "def liked(images, prompts):\n"
        "    values = images.mean(dim=(1, 2, 3)) + images.new_tensor([len(prompt.source or '') for prompt in prompts])\n"
        "    return Partial(values, images.new_tensor([prompt.size is None for prompt in prompts]) > 0)\n"
    )
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    reward = WorkerReward("packaged:liked", workers=2)
    scores = reward(images, PROMPTED)
    reward.close()
    assert scores.applies.tolist() == [False, True, True]
    assert torch.equal(scores.scores, images.mean(dim=(1, 2, 3))[1:] + torch.tensor([6.0, 0.0]))


def test_memory_and_noise_are_no_failures(faulty):
    assert ask(faulty, "full").tolist() == [4.0, 4.0]
    assert ask(faulty, "flood").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ends", "ended with exit code 7. It printed last:\n"),
        ("killed", "was killed by SIGKILL; perhaps the machine ran out"),
    ],
)
def test_a_crash_is_an_error_and_the_next_call_starts_anew(faulty, word, message):
    before = ask(faulty, "pid").tolist()
    start = time.monotonic()
    with pytest.raises(RewardError) as caught:
        ask(faulty, word)
    assert message in str(caught.value)
    assert word != "ends" or str(caught.value).endswith("\nthe last words")
    assert time.monotonic() - start < 10.0
    assert ask(faulty, "pid").tolist() != before


def test_a_process_that_is_late_is_ended(faulty):
    pid = int(ask(faulty, "pid")[0])
    faulty._processes[0].timeout = 0.5
    with pytest.raises(RewardError, match=r"worker_parts:Faulty gave no scores within 0.5 s"):
        ask(faulty, "sleeps")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)
    faulty._processes[0].timeout = 20.0


def test_a_process_that_ends_between_two_calls_leaves_nothing_behind(faulty):
    child = int(ask(faulty, "parent")[0])
    old = faulty._processes[0]._running
    os.kill(old.pid, signal.SIGKILL)
    os.waitid(os.P_PID, old.pid, os.WEXITED | os.WNOWAIT)
    assert int(ask(faulty, "pid")[0]) != old.pid
    assert old.stdin.closed
    assert old.stdout.closed
    assert old.returncode == -signal.SIGKILL
    until = time.monotonic() + 5.0
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "the child of the worker is still there"
        time.sleep(0.02)


def test_what_cannot_be_built_is_known_at_once():
    with pytest.raises(RewardError, match=r"cannot be built by .*: FileNotFoundError: weights.bin"):
        WorkerReward("worker_parts:Faulty", arguments={"start": "weights.bin"})
    for name in ("Ranked", "ranked"):
        with pytest.raises(RewardError, match=f"{name} scores all pictures of a prompt together, which a worker cannot"):
            WorkerReward(f"worker_parts:{name}")
    with pytest.raises(RewardError, match="Stepped must be told the step of a run, which a worker is not: name it among the rewards"):
        WorkerReward("worker_parts:Stepped")
    with pytest.raises(RewardError, match=r"was not ready within 0\.01 s"):
        WorkerReward("worker_parts:Faulty", start_timeout=0.01)


def test_what_must_be_told_the_step_is_no_reward_of_a_worker_inside_another_either(folder):
    (folder / "held.py").write_text(
        "from diffalign.core import StepReward\n"
        "from diffalign.rewards import Clipped\n\n\n"
        "class Late(StepReward):\n"
        "    def of_step(self, images, prompts, group, progress):\n"
        "        return self(images, prompts) * progress.step\n\n"
        "    def __call__(self, images, prompts):\n"
        "        return images.mean(dim=(1, 2, 3))\n\n\n"
        "late = Clipped(Late(), low=0.0)\n"
    )
    with pytest.raises(RewardError, match="held:late must score each image on its own; got Late, which must be told the step of a run"):
        WorkerReward("held:late")


def test_arguments_are_judged_without_a_process():
    with pytest.raises(ValueError, match=r'WorkerReward\.reward must be "module:name"'):
        WorkerReward("worker_parts.bright")
    with pytest.raises(ValueError, match=r"WorkerReward\.arguments must be what JSON can hold"):
        WorkerReward("worker_parts:Faulty", arguments={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"WorkerReward\.python must be an executable Python; got '/no/python'"):
        WorkerReward("worker_parts:bright", python="/no/python")


def test_an_interpreter_that_is_none_breaks_the_protocol(tmp_path):
    liar = tmp_path / "liar"
    liar.write_text("#!/bin/sh\necho 'Welcome to something else altogether'\nsleep 1\n")
    liar.chmod(0o755)
    with pytest.raises(RewardError, match="broke the protocol: a message announces"):
        WorkerReward("worker_parts:bright", python=str(liar))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "worker"
    folder.mkdir(exist_ok=True)
    (folder / "worker_parts.py").write_text(PARTS)
    before = Path.cwd()
    os.chdir(folder)
    reward = WorkerReward("worker_parts:Faulty", timeout=20.0, workers=2)
    os.chdir(before)
    yield reward
    reward.close()


def asked(reward, *words):
    return reward(torch.zeros(len(words), 3, 4, 4), [Prompt(word) for word in words])


def test_several_workers_score_in_the_order_of_the_images(pair):
    # "full" gives the length of each part's first prompt, one image at a time: so every score is its own image's
    assert asked(pair, *["full"] * 5).tolist() == [4.0] * 5
    first, second, third = asked(pair, "pid", "pid", "pid").tolist()
    assert first != second == third  # parts of 1 and 2 images
    assert {first, second} == {float(process._running.pid) for process in pair._processes}
    assert asked(pair, "pid").tolist() == [first]  # one image, one part
    assert len(asked(pair)) == 0


def test_of_several_workers_only_the_one_that_crashed_starts_anew(pair):
    before = asked(pair, "pid", "pid").tolist()
    with pytest.raises(RewardError, match=r"ended with exit code 7\. It printed last:"):
        asked(pair, "pid", "ends")
    after = asked(pair, "pid", "pid").tolist()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_the_first_error_of_several_workers_is_raised_when_all_are_done(pair):
    before = asked(pair, "pid", "pid").tolist()
    with pytest.raises(RewardError, match="raised KeyError: 'no such word'"):
        asked(pair, "raises", "fuller")
    assert asked(pair, "pid", "pid").tolist() == before


def test_a_late_worker_is_ended_and_the_other_goes_on(pair):
    asked(pair, "pid", "pid")
    first, second = (process._running for process in pair._processes)
    pair._processes[1].timeout = 0.3
    with pytest.raises(RewardError, match=r"gave no scores within 0\.3 s"):
        asked(pair, "pid", "sleeps")
    assert (first.poll(), second.poll()) == (None, -signal.SIGKILL)


def test_workers_share_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("diffalign.threads.usable_cores", lambda: 8)
    assert [of_child({}, beside)["OMP_NUM_THREADS"] for beside in (0, 3, 100)] == ["8", "2", "1"]
    assert of_child({"OMP_NUM_THREADS": "5"}, 3) == {"OMP_NUM_THREADS": "5"}


def test_less_than_one_worker_is_refused():
    with pytest.raises(ValueError, match="workers"):
        WorkerReward("worker_parts:bright", workers=0)
