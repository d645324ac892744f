"""Every objective, sampler, plan, rollout and wrapper on the pretended device: two steps end where they end on the CPU, to the bit."""

import pytest
import torch

from benchmarks.breaking.device_matrix import CASES, TREE, Case, after, gap, tiny
from diffalign.core import Condition, RewardError
from diffalign.objectives import SoftmaxTB
from diffalign.testing.pretended_device import MixedDevicesError


# a row a call is micro-batching once more, in twice the calls: `make gpu-check` has it on a real device
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(", rows 1")])
def test_two_steps_end_where_they_end_on_the_cpu(name):
    assert gap(CASES[name], "far", torch.float32) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SoftmaxTB, rows 2", "SoftmaxTB, three updates, rows 2", "FlowGRPO, rows 2", "TDM, rows 2"])
def test_every_type_of_number(name, dtype):
    assert gap(CASES[name], "far", dtype) == 0.0


def test_the_matrix_sees_a_difference():
    case = Case(lambda device, dtype: (SoftmaxTB(tiny(device, dtype, delta=0.3 if device == "cpu" else 0.31)), TREE))
    assert gap(case, "far", torch.float32) > 1e-3
    still = Case(CASES["SoftmaxTB, rows None"].build, lambda: {"rewards": {"one": lambda images, prompts: images.new_ones(len(images))}})
    with pytest.raises(ValueError, match="must have moved"):
        after(still, "far", torch.float32, steps=1)


# --- parts that mix devices -------------------------------------------------------------------------------------------------


def test_a_reward_that_mixes_devices_is_named_with_the_place():
    def mixing(images, prompts):
        return images.mean(dim=(1, 2, 3)) + torch.arange(len(images))

    case = Case(CASES["SoftmaxTB, rows None"].build, lambda: {"rewards": {"mixing": mixing}})
    with pytest.raises(RewardError, match=r"reward 'mixing' raised MixedDevicesError for .*test_far_matrix\.py:\d+ mixing"):
        after(case, "far", torch.float32)


def test_a_policy_whose_encode_forgets_its_device_is_named():
    class Forgetful(type(tiny("cpu", torch.float32))):
        def encode(self, prompts):
            condition = super().encode(prompts)
            return Condition(condition.prompts, condition.ids, {name: tensor.cpu() for name, tensor in condition.tensors.items()})

    policy = Forgetful((4, 2, 2)).to("far")
    with pytest.raises(ValueError, match=r"Forgetful\.encode must give tensors on far:0, where its weights are; 'embedding' is on cpu"):
        after(Case(lambda device, dtype: (SoftmaxTB(policy), TREE)), "far", torch.float32)


def test_a_condition_may_keep_whole_numbers_on_the_host():
    class Counting(type(tiny("cpu", torch.float32))):
        def encode(self, prompts):
            condition = super().encode(prompts)
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            return Condition(condition.prompts, condition.ids, {**condition.tensors, "lengths": lengths})

    after(Case(lambda device, dtype: (SoftmaxTB(Counting((4, 2, 2)).to(device)), TREE)), "far", torch.float32)


def test_a_sampler_of_ones_own_that_mixes_devices_fails_with_the_place():
    class MixedUp(type(TREE)):
        def sample(self, policy, condition, progress, streams):
            forest = super().sample(policy, condition, progress, streams)
            return forest.path_sum(torch.ones(len(forest.latents)))

    with pytest.raises((MixedDevicesError, RuntimeError), match=r"types\.py:\d+ path_sum"):
        after(Case(lambda device, dtype: (SoftmaxTB(tiny(device, dtype)), MixedUp(5, TREE.plan))), "far", torch.float32)
