"""Scoring beside the rollout: that it happens, that the numbers are the same, and what comes of every failure."""

import gc
import os
import signal
import threading
import time
import weakref

import attrs
import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.config import parse_text
from diffalign.core import (
    Hook,
    Interrupted,
    NonFiniteError,
    NonFiniteRewardError,
    Overlapped,
    Progress,
    RewardError,
    Sequential,
    StepReward,
    TrajectorySampler,
)
from diffalign.objectives import DiffusionNFT, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.runs.identity import differences
from diffalign.samplers import AdaptivePlan, Branching, DeterministicSampler, TreeSampler
from diffalign.testing import GivenPlan, TinyPolicy, channel_reward

TEXTS = ("a red cube", "two blue stars", "three green disks", "a grey cone", "a red cube")
PROMPTS = Prompts([Prompt(text) for text in TEXTS], shuffle=False)
TREE = TreeSampler(4, GivenPlan(Branching((1, 3, 1, 1), (0.0, 0.7, 0.5, 0.0))))
PATIENCE = 20.0


def build(rollout, objective=None, **options):
    options = {"optimizers": {"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}, "prompts_per_step": 5, **options}
    sampler, rewards = options.pop("sampler", TREE), options.pop("rewards", channel_reward)
    return AlignmentLoop(objective or SoftmaxTB(TinyPolicy()), sampler, rewards, PROMPTS, rollout=rollout, **options)


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.objective.policy.trainable_parameters().values()])


def step(loop):
    return loop.step(PROMPTS.draw(0, loop.prompts_per_step), Progress(0, 4))


@attrs.frozen
class Listening(TrajectorySampler):
    """Says when it has been asked."""

    sampler: TrajectorySampler
    said: object

    def sample(self, policy, condition, progress, streams):
        self.said(tuple(condition.prompts))
        return self.sampler.sample(policy, condition, progress, streams)


# --- the same numbers -------------------------------------------------------------------------------------------------------


def adaptive():
    return {
        "objective": SoftmaxTB(TinyPolicy(), beta=2.0),
        "sampler": TreeSampler(6, AdaptivePlan(low=0.5, high=2.0, splits=2, eta_factors=(1.3, 0.8))),
    }


def negative_aware():
    return {"objective": DiffusionNFT(TinyPolicy()), "sampler": DeterministicSampler(4, 3)}


def trained(rollout, parts):
    reports = []

    class Keeping(Hook):
        def step(self, loop, report):
            reports.append(report)

    loop = build(rollout, **parts(), hooks=[Keeping()], chunk=4)
    loop.run(3)
    return loop, reports


@pytest.mark.parametrize("parts", [adaptive, negative_aware])
@pytest.mark.parametrize(("prompts", "workers"), [(1, 1), (2, 1), (2, 3)])
def test_overlapped_is_sequential_bit_for_bit_and_all_at_once_to_rounding(parts, prompts, workers):
    loop, reports = trained(Overlapped(prompts, workers), parts)
    twin, expected = trained(Sequential(prompts), parts)
    assert torch.equal(weights(loop), weights(twin))
    for mine, its in zip(reports, expected, strict=True):
        assert torch.equal(mine.batch.rewards, its.batch.rewards)
        assert torch.equal(mine.images, its.images)
        names = [name for name in its.metrics if not name.startswith("memory/")]
        assert [mine.metrics[name] for name in names] == [its.metrics[name] for name in names]
        assert mine.ledger.rows == its.ledger.rows
        assert mine.ledger.calls == its.ledger.calls
    once, whole = trained(Sequential(), parts)
    torch.testing.assert_close(weights(loop), weights(once), rtol=1e-5, atol=1e-6)
    assert float((weights(once) - weights(build(Sequential(), **parts()))).norm()) > 1e-3
    for mine, its in zip(reports, whole, strict=True):
        torch.testing.assert_close(mine.batch.rewards, its.batch.rewards, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.images, its.images, rtol=1e-5, atol=1e-6)
        assert mine.prompts == its.prompts
        # the contract repeats calls, which are of other sizes
        assert {**mine.ledger.rows, "policy/contract": 0} == {**its.ledger.rows, "policy/contract": 0}


class Above(StepReward):
    """1 for the images that are above the mean of the step."""

    def __init__(self, worth=1.0):
        self.worth, self.asked = worth, []

    def of_step(self, images, prompts, group, progress):
        self.asked.append((list(prompts), group.tolist(), progress.step))
        values = channel_reward(images, prompts)
        return self.worth * (values > values.mean())

    def __call__(self, images, prompts):
        raise AssertionError("not in a step")


@pytest.mark.parametrize(
    ("rollout", "pieces"), [(Sequential(1), [3] * 5), (Overlapped(), [3] * 5), (Sequential(2), [3, 6, 6]), (Overlapped(2, 3), [3, 6, 6])]
)
def test_a_step_reward_is_asked_once_about_the_whole_step_and_the_others_by_piece(rollout, pieces):
    sizes = []

    def beside(images, prompts):
        sizes.append(len(images))
        return channel_reward(images, prompts)

    above = Above()
    mine = step(build(rollout, rewards={"above": above, "beside": beside}, chunk=2)).batch
    assert sorted(sizes) == pieces
    its = step(build(Sequential(), rewards={"above": above, "beside": beside}, chunk=2)).batch
    assert sizes[-1] == 15
    assert above.asked[0] == above.asked[1] == ([text for text in TEXTS for _ in range(3)], [i for i in range(5) for _ in range(3)], 0)
    assert list(mine.parts) == list(its.parts) == ["above", "beside"]
    assert 0 < float(its.parts["above"].sum()) < 15
    assert torch.equal(mine.parts["above"], its.parts["above"])
    torch.testing.assert_close(mine.parts["beside"], its.parts["beside"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rollout", [Sequential(2), Overlapped(2)])
def test_a_step_reward_alone_that_is_not_finite_comes_with_the_whole_step(rollout):
    with pytest.raises(NonFiniteRewardError, match="above returned nan for image 0 of 15") as caught:
        step(build(rollout, rewards={"above": Above(float("nan"))}))
    assert caught.value.evidence.prompts == TEXTS


# --- that they overlap ------------------------------------------------------------------------------------------------------


def meeting(rollout):
    """A run whose reward for one prompt waits until the next prompt is rolled out."""
    asked = {text: threading.Event() for text in TEXTS[:4]}

    def reward(images, prompts):
        following = TEXTS.index(str(prompts[0])) + 1
        if following < 4 and not asked[TEXTS[following]].wait(0.3 if isinstance(rollout, Sequential) else PATIENCE):
            raise TimeoutError(f"{TEXTS[following]!r} was not rolled out")
        return channel_reward(images, prompts)

    loop = build(rollout, rewards={"r": reward}, sampler=Listening(TREE, lambda prompts: asked[str(prompts[0])].set()), prompts_per_step=4)
    return step(loop)


def test_a_reward_that_waits_for_the_next_rollout_gets_it():
    report = meeting(Overlapped())
    assert torch.equal(report.batch.rewards, step(build(Sequential(1), prompts_per_step=4)).batch.rewards)
    with pytest.raises(RewardError, match="'two blue stars' was not rolled out"):
        meeting(Sequential(1))


def test_the_time_that_is_hidden_is_counted_once():
    def slow(images, prompts):
        time.sleep(0.1)
        return channel_reward(images, prompts)

    slower = Listening(TREE, lambda prompts: time.sleep(0.1))
    ledgers = {}
    for rollout in (Sequential(1), Overlapped()):
        begun = time.perf_counter()
        ledgers[rollout] = step(build(rollout, rewards=slow, sampler=slower, prompts_per_step=4)).ledger
        assert sum(ledgers[rollout].seconds.values()) <= time.perf_counter() - begun
    apart, beside = ledgers[Sequential(1)], ledgers[Overlapped()]
    assert apart.hidden == {}
    assert apart.seconds["reward"] >= 0.4
    assert beside.hidden["reward"] >= 0.2  # of the first three, 0.3 are hidden; less where the machine is busy
    assert beside.seconds["reward"] + beside.hidden["reward"] == pytest.approx(apart.seconds["reward"], abs=0.15)
    assert beside.seconds["reward"] < apart.seconds["reward"] - 0.15


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_than_the_workers_score_and_one_chunk_waits(workers):
    lock, scoring, most, decoded = threading.Lock(), [0], [0], []

    def reward(images, prompts):
        with lock:
            scoring[0] += 1
            most[0] = max(most[0], scoring[0])
        time.sleep(0.05)
        with lock:
            scoring[0] -= 1
            decoded.append(scored_before[0])
        return channel_reward(images, prompts)

    scored_before = [0]

    class Counting(TinyPolicy):
        def decode(self, latents):
            with lock:
                scored_before[0] += 1
                assert scored_before[0] - len(decoded) <= workers + 1
            return super().decode(latents)

    policy = Counting()
    step(build(Overlapped(workers=workers), SoftmaxTB(policy), rewards=reward, chunk=1))
    assert most[0] == workers
    assert len(decoded) == 15


# --- failures ---------------------------------------------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "reward"]


def test_the_error_of_a_reward_arrives_before_the_next_rollout_and_nothing_moves():
    asked = []

    def reward(images, prompts):
        if str(prompts[0]) == "two blue stars":
            raise ConnectionError("the server is gone")
        return channel_reward(images, prompts)

    loop = build(Overlapped(), rewards={"r": reward}, sampler=Listening(TREE, lambda prompts: (asked.append(prompts), time.sleep(0.1))))
    before = weights(loop)
    with pytest.raises(RewardError, match="reward 'r' raised ConnectionError for 3 images: the server is gone") as caught:
        step(loop)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert len(asked) <= 3  # the third may have been under way
    assert torch.equal(weights(loop), before)
    assert threads() == []


def test_a_score_that_is_not_finite_comes_with_its_batch():
    loop = build(Overlapped(2), rewards={"r": lambda images, prompts: [1.0] * (len(images) - 1) + [float("nan")]})
    with pytest.raises(NonFiniteRewardError, match="r returned nan for image 5 of 6, prompt 'two blue stars'") as caught:
        step(loop)
    assert caught.value.evidence.prompts == ("a red cube", "two blue stars")


class Blinds(TinyPolicy):
    """NaN for the third prompt."""

    def velocity(self, latents, sigma, condition):
        velocity = super().velocity(latents, sigma, condition)
        return torch.where((condition.ids == 2)[:, None], float("nan"), velocity)


def test_a_rollout_that_fails_waits_for_the_reward_under_way():
    done = []

    def slow(images, prompts):
        time.sleep(0.2)
        done.append(str(prompts[0]))
        return channel_reward(images, prompts)

    with pytest.raises(NonFiniteError, match="prompt 'three green disks'") as caught:
        step(build(Overlapped(), SoftmaxTB(Blinds()), rewards=slow))
    assert caught.value.evidence.prompts == ("three green disks",)
    assert done == ["a red cube", "two blue stars"]
    assert threads() == []


def test_where_the_scorer_runs_out_of_memory_the_chunk_is_halved(capsys):
    sizes = []

    def reward(images, prompts):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room for 3")
        return channel_reward(images, prompts)

    loop = build(Overlapped(), rewards=reward, chunk=5)
    report = step(loop)
    assert loop.chunk == 2
    assert "step 0: out of memory while decoding or scoring: chunk is 2 from now on" in capsys.readouterr().err
    assert sizes[-10:] == [2, 1] * 5
    torch.testing.assert_close(report.batch.rewards, step(build(Sequential())).batch.rewards)
    with pytest.raises(torch.OutOfMemoryError, match="Nothing is left to halve"):
        step(build(Overlapped(), rewards=lambda images, prompts: (_ for _ in ()).throw(torch.OutOfMemoryError("none")), chunk=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_does_not_keep_the_images_of_its_step_alive(workers):
    alive = []

    def reward(images, prompts):
        alive.append(weakref.ref(images))
        raise ValueError("no")

    gc.collect()
    gc.disable()
    try:
        try:
            step(build(Overlapped(workers=workers), rewards=reward))
        except RewardError as error:
            held = [reference() is not None for reference in alive]
            del error
        assert any(held)
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()


def interrupting(times):
    """A reward that sends signals and then takes its time."""
    released, left = threading.Event(), [times]

    def reward(images, prompts):
        assert threading.current_thread().daemon  # or the interpreter would wait for it at its end
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        released.wait(0.2 if times == 1 else PATIENCE)
        return channel_reward(images, prompts)

    return reward, released


def test_ctrl_c_waits_for_the_end_of_the_step():
    reward, _ = interrupting(1)
    loop = build(Overlapped(), rewards=reward, prompts_per_step=2)
    before = weights(loop)
    with pytest.raises(Interrupted, match="SIGINT"):
        loop.run(3)
    assert not torch.equal(weights(loop), before)


def test_the_second_ctrl_c_does_not_wait_for_the_reward():
    reward, released = interrupting(2)
    loop = build(Overlapped(), rewards=reward)
    before, begun = weights(loop), time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            loop.run(3)
    finally:
        released.set()
    assert not isinstance(caught.value, Interrupted)
    assert time.perf_counter() - begun < PATIENCE / 2
    assert torch.equal(weights(loop), before)


@pytest.mark.parametrize("wrong", [lambda: Overlapped(0), lambda: Overlapped(workers=0), lambda: Sequential(0)])
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="must be >= 1"):
        wrong()


# --- in a run file ----------------------------------------------------------------------------------------------------------

RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1, 0.0], [1, 0.0]], scale: 0.2}}
objective: SoftmaxTB
sampler: {class_path: TreeSampler, init_args: {steps: 6}}
rewards: JPEGCompressibility
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
"""


def test_it_is_chosen_in_the_run_file_and_no_part_of_its_identity():
    apart, beside = (parse_text(RUN, overrides=given) for given in ([], ["--rollout=Overlapped", "--rollout.prompts=2"]))
    assert apart.build().rollout == Sequential()
    assert beside.build().rollout == Overlapped(2)
    assert apart.yaml() != beside.yaml()
    assert differences(apart.yaml(), beside.yaml()) == []
