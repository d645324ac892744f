"""Costs of runs whose prompts ask for several image sizes or have texts of several lengths, and of nested guidance."""

import re

import pytest
import torch
from test_planner import line
from tiny_pipelines import saved

from diffalign import Prompt
from diffalign.core import CPS, AlignmentLoop, Guided, Ledger, Progress
from diffalign.costs import filling
from diffalign.costs.activations import Activations, counted_by_size, counted_of, sizes_of
from diffalign.costs.capacity import Cluster, capacity, row_flops
from diffalign.costs.cards import Card
from diffalign.costs.filling import Filling
from diffalign.costs.forecast import forecast
from diffalign.costs.rows import Counted
from diffalign.costs.sizes import activation_bytes, tensor_bytes, tokens
from diffalign.costs.utilisation import Utilisation, meter_of
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

SLOW = Card("slow", half=2e6, single=1e6, bandwidth=1e5)
OWN, LARGE = (32, 32), (64, 64)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def loaded(name="sd3", **settings):
        given = {"resolution": 32, "lora": LoRA(rank=2), "max_sequence_length": 24, "device": "cpu", **settings}
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), **given)

    return loaded


@pytest.fixture(scope="module")
def policy(load):
    return load()


def prompt(size, text="a"):
    return Prompt(text, {} if size is None else {"height": size[0], "width": size[1]})


def build(policy, *sizes, objective=SoftmaxTB, **options):
    prompts = Prompts([prompt(size) for size in sizes or (None,)])
    tree = TreeSampler(4, FixedPlan(splits=(1, 2)))
    return AlignmentLoop(objective(policy), tree, channel_reward, prompts, prompts_per_step=2, check_rows=0, **options)


def number(text, name, pattern):
    return float(re.search(pattern, line(text, name))[1].replace(",", ""))


def expected_seconds(loop):
    text = capacity(loop, Cluster(card=SLOW))
    return tuple(number(text, name, r"(\S+) s a step") for name in ("expected on slow", "least on slow", "fused"))


def test_expected_times_are_those_of_the_sizes_of_the_prompts(policy):
    own, small, large = (expected_seconds(build(policy, size)) for size in (None, OWN, LARGE))
    mixed = expected_seconds(build(policy, None, LARGE, LARGE, LARGE))
    assert own == small
    for one, other, mean in zip(small, large, mixed, strict=True):
        assert other > 3 * one  # four times the tokens
        assert mean == pytest.approx(0.25 * one + 0.75 * other, rel=0.01)  # of three digits


def test_steps_per_hour_are_those_of_the_counted_operations(policy):
    loop = build(policy, None, LARGE)
    found = {size: (share, counted(1)) for size, (share, counted) in counted_by_size(loop, policy).items()}
    assert [(size, share) for size, (share, _) in found.items()] == list(sizes_of(loop).items()) == [(None, 0.5), (LARGE, 0.5)]
    tree = loop.sampler.branching()
    update = 2 * loop.objective.update_rows(tree.leaves, tree.replay_rows)
    rows = {"forward": 2 * tree.rollout_rows + 2 * update, "backward": update}  # the update's and the reference's
    flops = sum(0.5 * (rows["forward"] * one.forward.useful + rows["backward"] * one.backward.useful) for _, one in found.values())
    said = capacity(loop, Cluster(teraflops=1e-3))
    assert number(said, "steps per hour", r"at most (\S+):") == pytest.approx(3600 * 1e9 / flops, rel=0.01)
    assert number(said, "steps per hour", r": (\S+) TFLOP") == pytest.approx(flops / 1e12, rel=0.01)


@pytest.mark.parametrize("name", ["flux-dev", "sd15"])
def test_at_most_is_no_less_than_expected(name, load):
    loop = build(load(name, resolution=64, max_sequence_length=None))
    most = number(capacity(loop, Cluster(teraflops=SLOW.single / 1e12)), "steps per hour", r"at most (\S+):")
    for which in ("expected on slow", "least on slow"):
        assert most >= number(capacity(loop, Cluster(card=SLOW)), which, r"\((\S+) an hour\)")


class Led(SoftmaxTB):
    """Rolls out with guidance, and trains without."""

    def behavior(self):
        return Guided(self.policy, 3.0)


def test_guidance_counts_where_it_is(policy):
    plain, rolled, both = (
        number(capacity(loop, Cluster(teraflops=1.0)), "steps per hour", r": (\S+) TFLOP")
        for loop in (build(policy), build(policy, objective=Led), build(TDMPolicy(Guided(policy, 3.0), kernel=CPS())))
    )
    tree = build(policy).sampler.branching()
    one = counted_of(build(policy), policy)(1).forward.useful / 1e12
    assert rolled - plain == pytest.approx(2 * tree.rollout_rows * one, rel=0.05)
    assert both == pytest.approx(2 * plain, rel=0.01)
    assert row_flops(TDMPolicy(Guided(policy, 3.0))) == 2 * row_flops(policy)


def packed(policy):
    """The same with a weight that is no number, as of a quantised layer."""
    policy.network.register_parameter("packed", torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    return policy


def test_what_cannot_be_counted_is_an_estimate_for_transformers_alone(load):
    loop = build(packed(load("flux-dev")), None)
    assert "  about " in line(capacity(loop, Cluster(teraflops=1.0)), "steps per hour")
    assert Activations.of(build(Guided(loop.objective.policy, 3.0))).at(5) == 2 * Activations.of(loop).at(5) > 0
    unet = build(packed(load("sd15", resolution=64, max_sequence_length=None)))
    assert row_flops(unet.objective.policy) == activation_bytes(unet.objective.policy) == 0
    said = capacity(unet, Cluster(memory=80.0, teraflops=1.0))
    assert "not known, because its operators cannot be counted: ValueError" in line(said, "steps per hour")
    assert line(said, "memory of a device").endswith("the update comes on top, its memory is not known")
    assert line(forecast(unet, 3), "memory").endswith(", and activations of the update, which are not known:")


def test_tokens_are_those_of_the_family(load, policy):
    assert tokens(policy.sized(LARGE)) == 4 * tokens(policy)
    for name in ("flux-dev", "z-image", "qwen-image"):  # their latents are packed into patches, whatever the configuration says
        packs = load(name)
        assert tokens(Guided(packs, 3.0)) == packs.family.tokens == packs.latent_shape[1] * packs.latent_shape[2] // 4


def test_latents_of_a_rollout_are_those_of_the_largest_size(policy):
    small, large, mixed = (forecast(build(policy, *sizes), 3) for sizes in ((None,), (LARGE,), (None, LARGE)))

    def latents(text):
        return next(row.strip() for row in text.splitlines() if row.endswith("latents and means of a rollout, at most"))

    assert latents(small).startswith("368 KiB")
    assert latents(mixed) == latents(large)
    assert latents(large).startswith("1 MiB")


def test_the_operations_of_a_step_are_those_of_its_size():
    ledger = Ledger(seconds={"rollout": 1.0, "update": 1.0}, rows={"policy/rollout": 10, "policy/update": 4}, tracked={"policy/rollout": 0})
    ledger.tracked["policy/update"] = 4
    meter = Utilisation(5.0, 7.0, 100.0, {None: (2.0, 3.0), LARGE: (8.0, 11.0)})
    for size, forward, backward in ((None, 2.0, 3.0), (LARGE, 8.0, 11.0), (OWN, 5.0, 7.0)):
        found = meter.read(ledger, {"policy"}, size)
        assert found == {"mfu/rollout": (10 * forward, 100.0), "mfu/update": (4 * (forward + backward), 100.0)}


def test_the_share_of_the_peak_is_of_the_size_that_prompts_ask_for(policy):
    found = []
    for size in (None, LARGE):
        loop = build(policy, size)
        loop.meter = meter_of(loop, teraflops=1e-6)
        report = loop.step(loop.prompts.draw(0, 2), Progress(0, 1))
        operations = report.metrics["mfu/rollout"] * report.ledger.seconds["rollout"] * 1e6 / report.ledger.rows["policy/rollout"]
        found.append(operations)
        counted = Counted.of(policy.sized(size), policy.encode([Prompt("a")]))
        assert operations == pytest.approx(counted(1).forward.useful)
    assert found[1] > 3 * found[0]
    mixed = meter_of(build(policy, None, LARGE), teraflops=1.0)
    assert mixed.forward == pytest.approx(sum(found) / 2)
    assert [mixed.sizes[size][0] for size in (None, LARGE)] == pytest.approx(found)


def test_each_step_takes_the_operations_of_its_own_size(policy):
    loop = build(policy, None, LARGE)
    loop.meter = meter_of(loop, teraflops=1e-6)
    for step in range(2):
        report = loop.step(loop.prompts.draw(step, 2), Progress(step, 2))
        operations = report.metrics["mfu/rollout"] * report.ledger.seconds["rollout"] * 1e6 / report.ledger.rows["policy/rollout"]
        assert operations == pytest.approx(loop.meter.sizes[report.batch.trajectories.condition.size][0])


def test_the_first_budget_is_guessed_at_the_largest_size(policy, monkeypatch):
    class Memory:
        def free(self):
            return 2**20

    guesses = []
    for sizes in ((None,), (None, LARGE)):
        monkeypatch.setattr(filling, "activation_bytes", lambda view: guesses.append(activation_bytes(view)) or 1)
        Filling()._first(build(policy, *sizes), Memory())
    assert guesses[1] == 4 * guesses[0] > 0
    assert guesses[0] < sum(map(tensor_bytes, policy.parameters()))


def test_the_memory_of_a_ragged_text_is_that_of_the_longest(load):
    short, long = "a cat", " ".join(["a red cat and two green cubes on a table"] * 12)
    policy, found = load("qwen-image", resolution=64, max_sequence_length=512), []
    for texts in ([short, long], [long, short], [short]):
        tree = TreeSampler(4, FixedPlan(splits=(1,), branches=2))
        found.append(Activations.of(AlignmentLoop(SoftmaxTB(policy), tree, channel_reward, Prompts(texts), prompts_per_step=1)).at(5))
    assert found[0] == found[1] > 1.5 * found[2]


@pytest.mark.parametrize("lora", [LoRA(rank=2), None], ids=["adapters", "all weights"])
def test_activations_that_are_computed_again_count_nothing(lora, load):
    plain, again = (meter_of(build(load("flux-dev", lora=lora, checkpointing=on)), teraflops=1.0) for on in (False, True))
    assert (again.forward, again.backward) == (plain.forward, plain.backward)
