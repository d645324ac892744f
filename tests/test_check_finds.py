"""`diffalign check`, and the constructor of the loop, find what the first step would."""

import re
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import attrs
import pytest
import torch

from diffalign.cli import main
from diffalign.core import AlignmentLoop, ConfigError, FlowSDE, Partial, Progress, Prompt, RewardError, score
from diffalign.core.demands import reach
from diffalign.core.scoring import OfSources
from diffalign.costs.attempt import attempt
from diffalign.digits import DigitsPolicy
from diffalign.objectives import DGPO, DiffusionNFT, FlowGRPO, GroupForwardKL, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.rewards import BinaryLiking, Cached, Clipped, Concurrent, GroupRank, HalvedBatches, RemoteReward, WeightedSum
from diffalign.samplers import ChainSampler, DeterministicSampler, DrawnSteps
from diffalign.testing.doubles import TinyPolicy, channel_reward


def loop_of(objective=SoftmaxTB, sampler=None, policy=None, prompts=("one", "two"), reward=channel_reward):
    policy = TinyPolicy() if policy is None else policy
    return AlignmentLoop(objective(policy), sampler or ChainSampler(4, 3), reward, Prompts(list(prompts)), prompts_per_step=1)


@pytest.mark.parametrize("objective", [SoftmaxTB, GroupForwardKL, FlowGRPO, DGPO, DiffusionNFT])
@pytest.mark.parametrize("sampler", [ChainSampler(4, 1), DeterministicSampler(4, 1), DrawnSteps((4, 5), 1)])
def test_one_sample_of_a_prompt_is_refused_before_anything_is_drawn(objective, sampler) -> None:
    with pytest.raises(ValueError, match=r"needs at least 2 samples per prompt|needs stochastic steps"):
        loop_of(objective, sampler)


@pytest.mark.parametrize("objective", [SoftmaxTB, GroupForwardKL, FlowGRPO])
def test_deterministic_trajectories_are_refused_by_objectives_over_paths(objective) -> None:
    with pytest.raises(
        ValueError, match=r"needs stochastic steps, but the sampler draws deterministic trajectories alone\. Take TreeSampler"
    ):
        loop_of(objective, DeterministicSampler(4))


def test_the_default_of_the_deterministic_sampler_serves_the_objectives_that_ask_for_it() -> None:
    assert DeterministicSampler().samples == 16
    for objective in (DGPO, DiffusionNFT):
        loop_of(objective, DeterministicSampler(8))


def test_too_few_noise_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DGPO\.levels must be at most the number of noise levels of the rollout from sigma_min 0\.5 on"):
        loop_of(DGPO, DeterministicSampler(2, 4))


def test_a_kernel_that_is_singular_where_noise_is_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="FlowSDE is singular at sigma = 1"):
        loop_of(policy=TinyPolicy(kernel=FlowSDE()), sampler=ChainSampler(4, 3, window=(0, 2)))
    loop_of(policy=TinyPolicy(kernel=FlowSDE()), sampler=ChainSampler(4, 3))


@pytest.fixture(scope="module")
def digits():
    return DigitsPolicy.from_pretrained(device="cpu")


def test_a_prompt_that_the_policy_cannot_read_is_refused(digits) -> None:
    with pytest.raises(ValueError, match="'a cat' is no prompt of digits"):
        loop_of(policy=digits, prompts=["an even digit", "a cat"])
    loop_of(policy=digits, prompts=["an even digit", "a thin seven"])


DIGITS = """
policy: {class_path: DigitsPolicy.from_pretrained, init_args: {device: cpu}}
objective: SoftmaxTB
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {splits: [1], branches: 3}}}
rewards: {class_path: ClassReward}
prompts: {class_path: Prompts, init_args: {prompts: [an even digit, a seven, a digit]}}
total: 2
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(DIGITS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sampler", "{class_path: ChainSampler, init_args: {samples: 1}}"], "SoftmaxTB needs at least 2 samples per prompt"),
        (["--sampler", "{class_path: DeterministicSampler}"], "SoftmaxTB needs stochastic steps"),
        (["--prompts.prompts", "[a cat]"], "prompts: 'a cat' is no prompt of digits"),
        (["--rewards", "{class_path: CountReward}"], "CountReward cannot score these prompts: "),
        (["--evaluation", "{prompts: shapeworld/count}"], "evaluation.prompts: "),
        (
            ["--rewards", "{class_path: RemoteReward, init_args: {url: 'http://127.0.0.1:9'}}"],
            "RemoteReward.url must name a server that runs",
        ),
    ],
)
def test_check_says_it_in_one_line(workplace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "run.yaml", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert message.count("\n") == 1


def test_check_tries_a_small_step_and_writes_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = "{prompts: digits/any-held-out, samples: 8, steps: 2}"
    assert main(["check", "run.yaml", "--try", "--evaluation", evaluation, "--prompts_per_step", "8"]) == 0
    assert "tried               one step on 2 prompts in " in capsys.readouterr().out
    assert [path.name for path in workplace.iterdir()] == ["run.yaml"]


def test_check_meets_what_only_a_step_can_show(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "check_scores.py").write_text("def broken(images, prompts):\n    return images[0].mean()\n")
    assert main(["check", "run.yaml", "--rewards", "check_scores.broken"]) == 0
    capsys.readouterr()
    assert main(["check", "run.yaml", "--rewards", "check_scores.broken", "--try"]) == 1
    assert "a reward must return one number per image" in capsys.readouterr().err


def test_a_server_is_reached_or_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        url = f"http://127.0.0.1:{there.getsockname()[1]}"
        reach([RemoteReward(["http://127.0.0.1:9", url]), channel_reward])
    for around in (
        lambda inner: Clipped(inner, 0.0, 1.0),
        lambda inner: BinaryLiking(inner, 0.5),
        Cached,
        GroupRank,
        HalvedBatches,
        lambda inner: Concurrent({"one": inner}),
        lambda inner: WeightedSum({"one": inner}),
        lambda inner: OfSources(inner, ("one",)),
        lambda inner: OfSources(GroupRank(Clipped(inner, 0.0, 1.0)), ("one",)),
    ):
        with pytest.raises(ValueError, match="must name a server that runs"):
            reach([around(RemoteReward(url))])
        reach([around(channel_reward)])


SOURCES = """{class_path: Mixture, init_args: {sources: {
  odd: {prompts: {class_path: Prompts, init_args: {prompts: [a seven]}}, share: 1, rewards: [far]},
  even: {prompts: {class_path: Prompts, init_args: {prompts: [a two]}}, share: 1, rewards: [near]}}}}"""
SERVED = "{near: ClassReward, far: {class_path: RemoteReward, init_args: {url: 'http://127.0.0.1:9'}}}"


def test_check_reaches_the_server_of_a_reward_of_one_source(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "run.yaml", f"--prompts={SOURCES}", f"--rewards={SERVED}", "--prompts_per_step", "2"]) == 2
    assert "RemoteReward.url must name a server that runs" in capsys.readouterr().err


# --- rewards, as they are called in a run

IMAGES, PROMPTS = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"]


def writes(images, prompts):
    images[0] = 0.0
    return images.mean(dim=(1, 2, 3))


def writes_by_numpy(images, prompts):
    pixels = images.numpy()
    pixels[1] += 0.1
    return pixels.mean(axis=(1, 2, 3))


def swaps_channels(images, prompts):
    pixels = images.numpy()
    pixels[:] = pixels[:, ::-1].copy()  # as OpenCV wants them
    return pixels.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("reward", [writes, writes_by_numpy, swaps_channels])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reward_must_not_write_into_its_images(reward, dtype) -> None:
    with pytest.raises(RewardError, match=r"must not change the images that it is given.*images\.clone\(\)"):
        score({"mine": reward}, IMAGES.to(dtype, copy=True), PROMPTS)


@pytest.mark.parametrize(("reward", "step", "found"), [(writes, 7, True), (writes_by_numpy, 7, False), (writes_by_numpy, 10, True)])
def test_what_numpy_writes_is_looked_for_at_every_fifth_step(reward, step, found) -> None:
    """A checksum takes as long as a small reward; what torch writes is counted by torch."""
    with pytest.raises(RewardError, match="must not change the images") if found else nullcontext():
        score({"mine": reward}, IMAGES.clone(), PROMPTS, progress=Progress(step, 100))


def test_a_reward_must_not_write_into_the_images_of_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RewardError, match="must not change the images"):
        score({"mine": writes}, IMAGES.clone(), PROMPTS)


def swapped(prompts, images):
    return images.mean(dim=(1, 2, 3))


def test_exchanged_arguments_are_seen_by_their_names() -> None:
    with pytest.raises(
        ValueError, match=r"rewards\['swapped'\] must take \(images, prompts\), in this order; it takes \(prompts, images\)"
    ):
        loop_of(reward=swapped)


def breaks(images, prompts):
    raise KeyError("colour")  # the line that is named


def test_the_error_of_a_reward_has_its_file_and_line() -> None:
    line = breaks.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"reward 'mine' raised KeyError for 3 images: 'colour' \({__file__}, line {line}\)"):
        score({"mine": breaks}, IMAGES, PROMPTS)


def test_the_try_names_a_reward_that_applies_to_no_picture() -> None:
    def nothing(images, prompts):
        return Partial(torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool))

    tried = attempt(loop_of(reward={"quoted": nothing, "bright": channel_reward}), 1)
    assert re.search(r"s: quoted: none, bright 0\.\d+, spread within a prompt 0\.\d+$", tried)


class Inked:
    """A reward that asks for a number in the metadata of a prompt."""

    def require(self, prompts):
        for prompt in prompts:
            if "ink" not in prompt.metadata:
                raise ConfigError(f"Inked needs a number 'ink' in the metadata of prompt {str(prompt)!r}")


@attrs.frozen
class Holding(ChainSampler):
    """A sampler that holds a reward, and passes on what it needs."""

    reward: Inked = attrs.field(factory=Inked)
    asked: list[str] = attrs.field(factory=list)

    def require(self, prompts):
        self.reward.require(prompts)

    def reach(self):
        self.asked.append("the reward's server")


def test_a_sampler_that_holds_a_reward_is_asked_before_the_run() -> None:
    sampler = Holding(4, 3)
    with pytest.raises(ConfigError, match="Inked needs a number 'ink' in the metadata of prompt 'one'"):
        loop_of(sampler=sampler)
    loop_of(sampler=sampler, prompts=[Prompt("one", {"ink": 0.3})]).reach()
    assert sampler.asked == ["the reward's server"]
