import threading

import attrs
import pytest
import torch
from ring import MODES, rewarded

from diffalign.core import ConfigError, Prompt, Reward, RewardError
from diffalign.evaluation import PixelFeatures, Rounds, cosine_distance, evaluate
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.processes.lockstep import AnnouncedCalls
from diffalign.prompts import Prompts
from diffalign.testing.doubles import TinyPolicy, channel_reward

PROMPTS = [Prompt(name) for name in ("a", "bb", "ccc", "dddd", "eeeee")]


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def equal(first, second, **tolerance):
    one, other = first.measures(), second.measures()
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.allclose(values, other[name], **tolerance), name
    assert torch.allclose(first.images, second.images, **tolerance)
    assert first.across == pytest.approx(second.across, rel=1e-5)


def test_chunks_of_rows_do_not_change_the_result():
    policy = TinyPolicy(dtype=torch.float64)
    whole = evaluate(policy, PROMPTS, {"near": channel_reward}, samples=4, steps=5, rows=1000)
    pieces = evaluate(policy, PROMPTS, {"near": channel_reward}, samples=4, steps=5, rows=8)
    equal(whole, pieces)
    assert whole.rewards["near"].shape == (5, 4)
    assert whole.images.shape[:2] == (5, 4)


def test_a_policy_is_compared_with_another_on_the_same_noise():
    policy = GaussianMixturePolicy(MODES, 0.3)
    first = evaluate(policy, PROMPTS, {"near": rewarded}, samples=4, steps=5)
    again = evaluate(policy.fork(), PROMPTS, {"near": rewarded}, samples=4, steps=5)
    other = evaluate(policy, PROMPTS, {"near": rewarded}, samples=4, steps=5, seed=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_a_single_mode_is_less_diverse_than_eight():
    ring = evaluate(GaussianMixturePolicy(MODES, 0.3), PROMPTS, {"b": brightness}, samples=8, steps=8)
    point = evaluate(GaussianMixturePolicy(MODES[:1], 0.3), PROMPTS, {"b": brightness}, samples=8, steps=8)
    assert point.l_gmd.mean() < ring.l_gmd.mean() - 1
    for name in ("cosine/pixels", "vendi/pixels", "modes/pixels", "ms_ssim_distance"):
        assert point.diversity[name].mean() < ring.diversity[name].mean(), name
    assert point.diversity["modes/pixels"].tolist() == pytest.approx([1.0] * 5)
    assert point.across["cosine/pixels"] < 0.1 < ring.across["cosine/pixels"]


def test_diversity_is_measured_on_the_images_of_each_prompt():
    result = evaluate(TinyPolicy(), PROMPTS, {"near": channel_reward}, samples=4, steps=5, pictures=5, features={"small": PixelFeatures(1)})
    vectors = PixelFeatures(1)(result.images.flatten(0, 1)).unflatten(0, (5, 4))
    assert torch.allclose(result.diversity["cosine/small"], cosine_distance(vectors))
    assert set(result.diversity) == {"l_gmd", "ms_ssim_distance", "cosine/small", "vendi/small", "modes/small"}
    # the reward sees each image with its own prompt
    images = result.images.flatten(0, 1)
    texts = [prompt for prompt in PROMPTS for _ in range(4)]
    assert torch.allclose(result.rewards["near"].flatten(), channel_reward(images, texts))


def test_summary_is_json_with_intervals_and_prompts():
    result = evaluate(TinyPolicy(), PROMPTS, {"near": channel_reward}, samples=2, steps=3, step=7, seed=5)
    summary = result.summary()
    assert (summary["step"], summary["samples"], summary["steps"], summary["seed"]) == (7, 2, 3, 5)
    assert summary["rewards"]["near"] == pytest.approx(result.rewards["near"].mean().item(), rel=1e-5)
    interval = summary["intervals"]["rewards"]["near"]
    assert interval["low"] < interval["mean"] < interval["high"]
    assert [row["prompt"] for row in summary["by_prompt"]] == ["a", "bb", "ccc", "dddd", "eeeee"]
    assert summary["by_prompt"][2]["diversity"]["l_gmd"] == result.l_gmd[2].item()
    assert f"reward near                   {interval['mean']:.3f} [{interval['low']:.3f}" in result.table()


@attrs.frozen(eq=False)
class Threads:
    """`Devices` of threads, to see what every process would."""

    rank: int
    size: int
    board: dict
    gate: threading.Barrier

    def _all(self, values):
        self.board[self.rank] = values
        self.gate.wait(30)
        found = [self.board[rank] for rank in range(self.size)]
        self.gate.wait(30)
        return found

    def sum(self, values):
        return torch.stack(self._all(values)).sum(dim=0)

    def maximum(self, values):
        return torch.stack(self._all(values)).amax(dim=0)

    def gather(self, values):
        pieces = self._all(values)
        assert len({piece.shape for piece in pieces}) == 1, "collectives of real devices need equal shapes"
        return torch.cat(pieces)

    def barrier(self):
        self.gate.wait(30)


def in_threads(size, work):
    """What `work(devices)` gives in each of `size` threads, or raises."""
    board, gate, results = {}, threading.Barrier(size), [None] * size

    def one(rank):
        try:
            results[rank] = work(Threads(rank, size, board, gate))
        except Exception as error:  # handed to the test
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_numbers(size):
    policy = TinyPolicy()
    settings = {"samples": 3, "steps": 4, "rows": 6, "pictures": 4}
    alone = evaluate(policy, PROMPTS, {"near": channel_reward}, **settings)
    forks = [policy.fork() for _ in range(size)]
    shared = in_threads(size, lambda devices: evaluate(forks[devices.rank], PROMPTS, {"near": channel_reward}, **settings, devices=devices))
    for result in shared:
        equal(alone, result, atol=1e-6)
        assert result.images.shape == alone.images.shape
    calls = {fork.counter.calls for fork in forks}
    assert len(calls) == 1, "sharded weights need the same calls in every process"


def test_an_error_in_one_process_stops_all():
    def work(devices):
        def reward(images, prompts):
            if devices.rank == 1:
                raise ValueError("no licence")
            return brightness(images, prompts)

        return evaluate(TinyPolicy(), PROMPTS, {"odd": reward}, samples=2, steps=2, devices=devices)

    for result in in_threads(2, work):
        assert "no licence" in str(result)


def announced(policy, devices):
    """Keeps calls in step as sharded weights need it; these here are whole."""
    return AnnouncedCalls.over({"policy": policy}, devices, [])


def test_an_error_in_one_process_is_told_to_those_that_wait_in_a_sharded_call():
    def work(devices):
        def reward(images, prompts):
            if devices.rank == 1:
                raise ValueError("no licence")
            return brightness(images, prompts)

        policy = TinyPolicy()  # of three rounds, the other process begins the second
        return evaluate(policy, PROMPTS, {"odd": reward}, samples=2, rows=2, devices=devices, lockstep=announced(policy, devices))

    first, second = in_threads(2, work)
    assert isinstance(first, RewardError)
    assert isinstance(second, RewardError)
    assert str(second).startswith("reward 'odd' raised ValueError for 2 images: no licence")
    assert str(first) == f"process 1 of 2: {second}"


def test_calls_that_are_kept_in_step_give_the_same_numbers():
    def work(devices):
        policy = TinyPolicy()
        lockstep = announced(policy, devices)
        result = evaluate(policy, PROMPTS, {"near": channel_reward}, samples=3, steps=4, rows=6, devices=devices, lockstep=lockstep)
        assert lockstep.padded == 0, "no process makes a call for another"
        return result

    alone = evaluate(TinyPolicy(), PROMPTS, {"near": channel_reward}, samples=3, steps=4, rows=6)
    for result in in_threads(2, work):
        equal(alone, result, atol=1e-6)


def test_a_round_that_one_process_cannot_read_stops_all(tmp_path):
    class Unreadable(Rounds):
        def under(self, settings):
            return self

        def load(self, name):
            raise OSError("bad sector")

    def work(devices):
        kind = Unreadable if devices.rank == 1 else Rounds
        return evaluate(TinyPolicy(), PROMPTS, {}, samples=2, steps=2, devices=devices, rounds=kind(tmp_path, "weights 1"))

    assert [str(result) for result in in_threads(2, work)] == ["process 1 of 2: bad sector", "bad sector"]


@attrs.define(eq=False)
class Interrupted:
    """A reward that is stopped at its n-th call."""

    calls_left: int
    calls: int = 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left -= 1
        return channel_reward(images, prompts)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    settings = {"samples": 2, "steps": 3, "rows": 4, "pictures": 3}
    policy, rounds = TinyPolicy(), Rounds(tmp_path, "weights 1")
    whole = evaluate(policy, PROMPTS, {"near": channel_reward}, **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, PROMPTS, {"near": Interrupted(2)}, **settings, rounds=rounds)
    rest = Interrupted(100)
    equal(whole, evaluate(policy, PROMPTS, {"near": rest}, **settings, rounds=rounds))
    assert rest.calls == 1, "of three rounds, two were done"
    for other in ({"seed": 1}, {"steps": 4}, {"samples": 3}, {"features": {}}):
        fresh = Interrupted(100)
        evaluate(policy, PROMPTS, {"near": fresh}, **{**settings, **other}, rounds=rounds)
        assert fresh.calls >= 3, other
    fresh, others = Interrupted(100), Rounds(tmp_path, "weights 2")
    evaluate(policy, PROMPTS, {"near": fresh}, **settings, rounds=others)
    assert fresh.calls == 3
    rounds.clear()
    again = Interrupted(100)
    evaluate(policy, PROMPTS, {"near": again}, **settings, rounds=others)
    assert again.calls == 0, "another evaluation's rounds stay"
    others.clear()
    assert not tmp_path.exists()


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(TinyPolicy(), [], {"near": channel_reward})


def test_a_source_and_a_reward_are_taken_as_a_loop_takes_them():
    by_hand = evaluate(TinyPolicy(), PROMPTS, {"channel_reward": channel_reward}, samples=2, steps=2)
    source = Prompts([str(prompt) for prompt in PROMPTS], seed=5)
    as_in_a_loop = evaluate(TinyPolicy(), source, channel_reward, samples=2, steps=2)
    assert as_in_a_loop.prompts == tuple(PROMPTS)
    equal(by_hand, as_in_a_loop)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", r"must be a list of texts, or a source .*; got the text 'a cat'. Put it in a list: \['a cat'\]"),
        (Prompt("a cat"), "got the text 'a cat'"),
        (7, "must be a list of texts, or a source that lists its prompts; got int"),
    ],
)
def test_one_text_is_no_list_of_its_letters(prompts, message):
    with pytest.raises(ValueError, match=message):
        evaluate(TinyPolicy(), prompts, {"near": channel_reward}, samples=2, steps=2)


@attrs.frozen
class Knowing(Reward):
    """A reward of prompts with metadata alone, which counts its calls."""

    calls: list = attrs.field(factory=list)

    def require(self, prompts):
        for prompt in prompts:
            if "kind" not in prompt.metadata:
                raise ConfigError(f"Knowing needs 'kind' in the metadata of {str(prompt)!r}")

    def __call__(self, images, prompts):
        self.calls.append(len(images))
        return brightness(images, prompts)


def test_what_a_reward_demands_of_prompts_is_asked_before_anything_is_drawn():
    policy, reward = TinyPolicy(), Knowing()
    with pytest.raises(ConfigError, match="Knowing needs 'kind' in the metadata of 'b'"):
        evaluate(policy, [Prompt("a", {"kind": 1}), "b"], {"known": reward, "near": channel_reward}, samples=2, steps=2, rows=2)
    assert (policy.counter.calls, reward.calls) == (0, [])
    assert evaluate(policy, [Prompt("a", {"kind": 1})], reward, samples=2, steps=2).rewards["Knowing"].shape == (1, 2)


def test_without_a_number_of_steps_a_student_takes_its_own():
    student = TDMPolicy(TinyPolicy(), steps=3)
    assert evaluate(student, ["a"], {}, samples=2).settings["steps"] == 3
    assert evaluate(TinyPolicy(), ["a"], {}, samples=2).settings["steps"] == 28
    assert evaluate(TinyPolicy(), ["a"], {}, samples=2, steps=2).settings["steps"] == 2


def test_it_is_printed_as_its_table():
    result = evaluate(TinyPolicy(), PROMPTS, {"near": channel_reward}, samples=2, steps=3)
    assert str(result) == result.table()
    assert "tensor" not in repr(result)
    assert "rewards={'near': [5, 2]}" in repr(result)
    assert len(repr(result)) < 500


def test_what_is_no_reward_is_named_before_anything_is_drawn():
    with pytest.raises(ValueError, match=r"rewards\['int'\] must be callable"):
        evaluate(TinyPolicy(), PROMPTS, 7, samples=2, steps=2)


def test_one_sample_has_no_diversity():
    with pytest.raises(ValueError, match="samples must be at least 2, because one sample of a prompt has no diversity; got 1"):
        evaluate(TinyPolicy(), ["a", "b"], {"channel": channel_reward}, samples=1, steps=2)
