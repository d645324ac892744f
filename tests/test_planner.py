"""The planner's arithmetic, against what a run does."""

import pytest
import torch
from ring import ring_loop
from tiny_pipelines import saved

from diffalign import Prompt
from diffalign.core import AlignmentLoop
from diffalign.costs.activations import Activations
from diffalign.costs.capacity import Cluster, capacity, measured_teraflops, row_flops
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward


@pytest.mark.parametrize(
    ("prompts", "devices", "text"),
    [
        (8, 4, "4 x 2 prompt groups = 8 prompts a step; none waits"),
        (10, 4, "2 of 4 take 3 prompt groups, 2 take 2 and wait: 83% of the time is used. With 8 or 12 prompts_per_step none waits."),
        (3, 4, "3 prompt groups: the samples of a group are compared with each other, so it is never split. Give at least 4"),
    ],
)
def test_groups_and_devices(prompts, devices, text):
    loop = ring_loop()
    loop.prompts_per_step = prompts
    assert text in capacity(loop, Cluster(devices))


@pytest.fixture(scope="module")
def loop():
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=4), max_sequence_length=16, device="cpu")
    tree = TreeSampler(4, FixedPlan(splits=(1, 2)))
    return AlignmentLoop(SoftmaxTB(policy), tree, channel_reward, Prompts(["a"]), prompts_per_step=4)


@pytest.fixture(scope="module")
def activations(loop):
    return Activations.of(loop)


def line(text, name):
    return next(row for row in text.splitlines() if row.startswith(name))


def test_the_row_budget_that_is_named_fits(loop, activations):
    taken = [activations.at(rows) / 2**30 for rows in range(4)]
    loose = capacity(loop, Cluster(memory=100.0, teraflops=1.0), activations)
    assert "all 16 rows of an update fit 100 GiB at once" in loose
    fixed = 100.0 - activations.at(int(loose.split("at once (")[1].split()[0])) / 2**30
    budget = line(capacity(loop, Cluster(memory=fixed + taken[3], teraflops=1.0), activations), "row budget").split()[3]
    assert budget == "3"  # between 3 and 4 fit, because `fixed` is up to one row too large
    tight = line(capacity(loop, Cluster(memory=fixed - 0.5 * taken[1], teraflops=1.0), activations), "row budget")
    assert "nothing fits" in tight
    assert "Shard the weights (--shard)" in tight


def test_memory_is_that_of_the_largest_prompt_and_speed_that_of_all(tmp_path_factory):
    base = FlowMatchingPolicy.from_pretrained(
        saved(tmp_path_factory, "sd3"), resolution=32, lora=LoRA(rank=2), max_sequence_length=24, device="cpu"
    )
    asked = [None, (64, 64), (32, 64), (32, 64)]

    def numbers(*sizes):
        prompts = [Prompt("a", {} if size is None else {"height": size[0], "width": size[1]}) for size in sizes]
        tree = TreeSampler(4, FixedPlan(splits=(1, 2)))
        loop = AlignmentLoop(SoftmaxTB(base), tree, channel_reward, Prompts(prompts), prompts_per_step=2)
        text = capacity(loop, Cluster(teraflops=1.0))
        memory, speed = line(text, "memory of a device"), line(text, "steps per hour")
        return memory, float(speed.split(" TFLOP")[0].split()[-1])

    mixed, large, own = numbers(*asked), numbers((64, 64)), numbers(None)
    assert mixed[0] == large[0]
    assert mixed[0].endswith("in the update, at 64 x 64 (height x width), the largest size of a prompt")
    assert own[0].endswith("in the update")
    assert base.latent_shape == (4, 16, 16)
    every = [numbers(size)[1] for size in asked[:3]]
    every.append(every[2])
    assert every[0] < every[2] < every[1]
    assert mixed[1] == pytest.approx(sum(every) / 4, rel=1e-2)  # of three digits


def test_sharding_shows_in_the_memory(loop, activations):
    texts = [line(capacity(loop, Cluster(4, teraflops=1.0, shard=shard), activations), "memory of a device") for shard in (False, True)]
    assert "(whole in each)" in texts[0]
    assert "(sharded)" in texts[1]
    whole, sharded = (float(text.split(": ")[1].split()[0]) for text in texts)  # MiB
    assert sharded < 0.5 * whole


def test_flops_are_those_that_torch_counts(loop):
    from torch.utils.flop_counter import FlopCounterMode

    policy = loop.objective.reference
    condition = policy.encode(Prompts(["a"]).draw(0, 2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.velocity(torch.randn(2, *policy.latent_shape), torch.full((2,), 0.5), condition)
    # the estimate leaves out the text's tokens, which are few, and what is one vector a row
    assert row_flops(policy) == pytest.approx(counter.get_total_flops() / 2, rel=0.35)


def test_steps_per_hour_follow_the_speed(loop, activations):
    def steps(teraflops):
        return float(
            line(capacity(loop, Cluster(teraflops=teraflops), activations), "steps per hour").split()[5].rstrip(":").replace(",", "")
        )

    assert steps(2.0) == pytest.approx(2 * steps(1.0), rel=1e-3)
    assert measured_teraflops(torch.device("cpu"), torch.float32, side=64) > 0
