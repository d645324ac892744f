"""The command `diffalign serve-reward`, in a process of its own."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import uvicorn

from diffalign.cli import main
from diffalign.config.reward_file import read_reward
from diffalign.core import Prompt, RewardError
from diffalign.rewards.compressibility import JPEGCompressibility
from diffalign.rewards.remote import RemoteReward
from diffalign.serving import Settings, application

PARTS = """
import time
import attrs
from diffalign.core import Reward, StepReward

class Told(StepReward):
    def of_step(self, images, prompts, group, progress):
        return [progress.fraction] * len(images)
    def __call__(self, images, prompts):
        return [0.0] * len(images)

@attrs.frozen
class Slow(Reward):
    factor: float = 1.0

    def __call__(self, images, prompts):
        time.sleep(prompts[0].metadata.get("seconds", 0))
        return self.factor * images.mean(dim=(1, 2, 3))

def plain(images, prompts):
    return [1.0] * len(images)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "served_parts.py").write_text(PARTS)
    (tmp_path / "jpeg.yaml").write_text("class_path: JPEGCompressibility\ninit_args:\n  quality: 90\n")
    (tmp_path / "plain.yaml").write_text("served_parts.plain\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFALIGN_REWARD_TOKEN", raising=False)
    return tmp_path


def test_a_server_that_is_killed_in_the_midst_of_a_request(folder, monkeypatch):
    (folder / "token").write_text("swordfish\n")
    (folder / "slow.yaml").write_text("class_path: served_parts.Slow\ninit_args:\n  factor: 2.0\n")
    options = ["--port", "0", "--token-file", "token", "--device", "cpu", "--factor", "3"]
    command = [sys.executable, "-m", "diffalign", "serve-reward", "slow.yaml", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        said = re.fullmatch(r"serving Slow at (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
        assert said
        images = (torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
        with pytest.raises(RewardError, match="answered 401"):
            RemoteReward(said[1])(images, ["a"] * 5)
        monkeypatch.setenv("DIFFALIGN_REWARD_TOKEN", "swordfish")
        assert torch.equal(RemoteReward(said[1])(images, ["a"] * 5), 3.0 * images.mean(dim=(1, 2, 3)))

        threading.Timer(0.5, process.kill).start()
        begun = time.monotonic()
        with pytest.raises(RewardError, match=r"no score after 2 tries; the last failed at .*Refused"):
            RemoteReward(said[1], retries=1, backoff=0.05, timeout=60.0)(images, [Prompt("a", {"seconds": 50})] * 5)
        assert time.monotonic() - begun < 20.0
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_comes_back_while_the_client_still_asks():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reward = RemoteReward(f"http://127.0.0.1:{port}", retries=60, backoff=0.02, timeout=30.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(reward, torch.ones(2, 3, 2, 2), ["a", "b"])
        time.sleep(0.2)
        assert not asked.done()
        reading = JPEGCompressibility(50)
        app = application(reading, "late", Settings(device="cpu"))
        with socket.create_server(("127.0.0.1", port)) as listening:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            serving.start()
            assert torch.equal(asked.result(30), reading(torch.ones(2, 3, 2, 2), []))
            reward.close()
            server.should_exit = True
            serving.join(10)


def test_a_reward_file_is_read_as_a_run_would_read_it(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    assert read_reward(Path("jpeg.yaml")) == (JPEGCompressibility(90), "JPEGCompressibility")
    assert read_reward(Path("jpeg.yaml"), ["--quality", "50"]) == (JPEGCompressibility(50), "JPEGCompressibility")
    assert read_reward(Path("jpeg.yaml"), ["--init_args.quality=60"]) == (JPEGCompressibility(60), "JPEGCompressibility")
    reward, name = read_reward(Path("plain.yaml"))
    assert (name, reward(torch.zeros(2, 3, 1, 1), ["a", "b"])) == ("plain", [1.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml must be a readable UTF-8 file"),
        (["jpeg.yaml", "--quality", "101"], "reward.quality must be <= 100; got 101"),
        (["jpeg.yaml", "--qality", "50"], "Did you mean quality?"),
        (["list.yaml"], "list.yaml must hold one reward: its name, or class_path and init_args; got list"),
        (["two.yaml"], "got keys one, two"),
        (["unknown.yaml"], "reward must be"),
        (["rank.yaml"], "the reward of a server must score each image on its own; got GroupRank, which must see all pictures of a prompt"),
        (["sum.yaml"], "the reward of a server must score each image on its own; got Told, which must be told the step of a run"),
        (["jpeg.yaml", "--host", "0.0.0.0"], "so clients must have a token: give --token-file"),
        (["jpeg.yaml", "--token-file", "nothing"], "--token-file must be a readable file with a token"),
        (["jpeg.yaml", "--token-file", "empty"], "--token-file empty must hold a token; it is empty"),
        (["jpeg.yaml", "--token-file", "two-lines"], "token must be printable ASCII on one line"),
        (["jpeg.yaml", "--token-file", "empty", "--without-token"], "exclude each other"),
        (["jpeg.yaml", "--host", "203.0.113.7", "--without-token"], "cannot listen on 203.0.113.7 port 8000"),
        (["jpeg.yaml", "--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_what_cannot_be_served_is_one_message(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.syspath_prepend(folder)
    (folder / "list.yaml").write_text("[a, b]")
    (folder / "two.yaml").write_text("{one: a, two: b}")
    (folder / "unknown.yaml").write_text("NoSuchReward")
    (folder / "rank.yaml").write_text("{class_path: GroupRank, init_args: {reward: JPEGCompressibility}}")
    (folder / "sum.yaml").write_text("{class_path: WeightedSum, init_args: {rewards: {told: served_parts.Told}}}")
    (folder / "empty").write_text("\n")
    (folder / "two-lines").write_text("a\nb\n")
    assert main(["serve-reward", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_missing_extra_is_named(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffalign.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("diffalign.serving", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve-reward", "jpeg.yaml"]) == 2
    assert "pip install 'diffalign[server]'" in capsys.readouterr().err
