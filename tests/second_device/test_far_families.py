"""Every model family's tiny pipeline on the pretended device: encoding, rollout, replay, guidance, decoding, offloading."""

import pytest
import torch
from tiny_pipelines import BUILD, saved
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign import AlignmentLoop
from diffalign.core import CPS, Guided, Progress, Streams, check_first_step
from diffalign.objectives import SoftmaxTB, SurrogateReward
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, ChainSampler, DeterministicSampler, TreeSampler
from diffalign.testing import GivenPlan, channel_reward

TREE = TreeSampler(3, GivenPlan(Branching((2, 2, 1), (0.7, 0.7, 0.0))))
TEXTS = ["a red cube", "two green cats on a mat"]
FAMILIES = [name for name in BUILD if name not in ("flux-schnell", "sd15-v")]
UNETS = ("sd15", "sdxl")


@pytest.fixture
def load(tmp_path_factory):
    def load(name, device, **options):
        given = {"lora": LoRA(rank=2), "resolution": 32, "max_sequence_length": 256 if name == "qwen-image" else 24, **options}
        if name in UNETS:
            del given["max_sequence_length"]
        torch.manual_seed(0)
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), device=device, **given)

    return load


def trained(objective, sampler=TREE):
    policy = objective.policy
    # the length of a step is the gradient's: attention may take another kernel there, and AdamW divides rounding by rounding
    optimizers = {"default": lambda parameters: torch.optim.SGD(parameters, lr=1e-3)}
    loop = AlignmentLoop(objective, sampler, channel_reward, Prompts(TEXTS), prompts_per_step=2, optimizers=optimizers, check_rows=4)
    before = [parameter.detach().clone() for parameter in policy.trainable_parameters().values()]
    loop.run(2)
    after = policy.trainable_parameters().values()
    assert any(not torch.equal(now, then) for now, then in zip(after, before, strict=True))
    assert all(parameter.device == policy.device for parameter in policy.parameters())
    return {name: now.detach().cpu() - then.cpu() for name, now, then in zip(policy.trainable_parameters(), after, before, strict=True)}


def same(one, other):
    """How far they moved, as a whole: two kernels of attention round differently."""
    assert one.keys() == other.keys()
    gap = torch.stack([(one[key] - other[key]).norm() for key in other]).norm()
    assert gap <= 1e-4 * torch.stack([moved.norm() for moved in other.values()]).norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_end_where_they_end_on_the_cpu(name, load):
    # a temperature at which the reward decides: in nats the rounding of two kernels of attention adds up over all numbers of a latent
    with sdpa_kernel(SDPBackend.MATH):  # one kernel on both: how far two of them are apart depends on the processor
        same(*(trained(SoftmaxTB(load(name, device), beta=1e5, rows=3)) for device in ("far", "cpu")))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_guided_teacher_and_student_there(name, load):
    if name in UNETS:
        pytest.skip("their grid is the one they were trained on")
    student = TDMPolicy(load(name, "far"), steps=2)
    trained(SurrogateReward(student, guidance=3.0, reward_guidance=3.0, negative="blur"), DeterministicSampler(2, samples=2))


# float16 is another number of bits where bfloat16 is one already: a transformer and a UNet are enough for it
@pytest.mark.parametrize(
    ("dtype", "name"), [*((dtype, name) for dtype in ("float32", "bfloat16") for name in FAMILIES), ("float16", "sd3"), ("float16", "sd15")]
)
def test_a_guided_rollout_is_repeated_to_the_bit_and_has_pictures(dtype, name, load):
    policy = Guided(load(name, "far", dtype=dtype, offload=name == "sd3"), 3.0, "blur")
    condition = policy.encode([*Prompts(TEXTS).draw(0, 2)])
    with torch.no_grad():
        forest = ChainSampler(4, 2, rows=3).sample(policy, condition, Progress(0, 1), Streams(0))
        images = policy.decode(forest.samples)
    assert check_first_step(policy, forest).deviation == 0.0  # on the family's own grid, at every level
    assert forest.latents.device == images.device == torch.device("far", 0)
    assert images.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"offload": True}, {"checkpointing": True}, {"slicing": True}, {"lora": None}], ids=str)
def test_the_options_of_a_pipeline(options, dtype, load):
    if options.get("lora", True) is None and dtype != "float32":
        pytest.skip("all weights are trained in float32")
    there = trained(SoftmaxTB(load("sd3", "far", dtype=dtype, **options), beta=1e5, rows=2, updates=2))
    if dtype == "float32":  # in bfloat16 rounding is a third of so small a network's gradient
        same(there, trained(SoftmaxTB(load("sd3", "cpu", **options), beta=1e5, rows=2, updates=2)))


def test_a_stochastic_student(load):
    policy = TDMPolicy(load("flux-dev", "far", kernel=CPS()), steps=3, kernel=CPS())
    trained(SoftmaxTB(policy, rows=2))
