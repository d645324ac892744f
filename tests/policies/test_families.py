"""Every model family as a policy, held against its plain diffusers pipeline on tiny random weights."""

from itertools import pairwise

import attrs
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tiny_pipelines import BUILD, built, flux2_dev, saved

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Guided, Progress, Streams
from diffalign.objectives import SoftmaxTB, SurrogateReward
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.policies.diffusers import Setting
from diffalign.policies.diffusers.flux2 import Flux2
from diffalign.policies.diffusers.packing import pack, unpack
from diffalign.policies.diffusers.stable_diffusion import StableDiffusion
from diffalign.policies.diffusers.stable_diffusion_xl import StableDiffusionXL
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, DeterministicSampler, TreeSampler
from diffalign.testing import GivenPlan, channel_reward

PROMPTS = [Prompt("a red cube"), Prompt("two green cats on a mat")]
NEGATIVE = "blur"
STEPS = 4  # divides 1000: else DDIM takes steps to other levels than it calls its network at
TREE = TreeSampler(3, GivenPlan(Branching((2, 2, 1), (0.7, 0.7, 0.0))))
PACKED = ("flux-dev", "flux-schnell", "qwen-image")


@attrs.frozen
class Call:
    """Arguments of a plain pipeline call, and what they are called for guidance."""

    plain: dict
    guided: dict
    scale: float = 4.0
    negative: str = NEGATIVE
    length: int | None = 24


CALLS = {
    "sd3": Call({"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}),
    "flux-dev": Call({}, {"true_cfg_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}),
    "flux-schnell": Call({}, {"true_cfg_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}),
    "flux2-klein": Call({"guidance_scale": 1.0}, {"guidance_scale": 4.0}, negative=""),
    "z-image": Call({"guidance_scale": 0.0}, {"guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}),
    # its tokenizer spells the chat template, so that the prompt comes late
    "qwen-image": Call({"true_cfg_scale": 1.0}, {"true_cfg_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}, length=256),
    "sana": Call({"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}),
    "sd15": Call({"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}, length=None),
    "sd15-v": Call({"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}, length=None),
    "sdxl": Call({"guidance_scale": 1.0}, {"guidance_scale": 4.0}, negative="", length=None),
}


ONE_EACH = pytest.mark.parametrize("name", [name for name in BUILD if name not in ("flux-schnell", "sd15-v")], indirect=True)
"""For what does not depend on guidance inputs and on what is predicted."""


@pytest.fixture(scope="module", params=list(BUILD))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, name):
    return saved(tmp_path_factory, name)


@pytest.fixture(scope="module")
def plain(folder):
    model = DiffusionPipeline.from_pretrained(folder)
    model.set_progress_bar_config(disable=True)
    return model


def load(folder, name, lora=LoRA(rank=2, alpha=6), **options):  # noqa: B008  a frozen value
    options = {"resolution": 32, "max_sequence_length": CALLS[name].length, "device": "cpu", **options}
    return FlowMatchingPolicy.from_pretrained(folder, lora=lora, **options)


@pytest.fixture(scope="module")
def base(folder, name):
    return load(folder, name, lora=None)


def sample(policy, prompts=PROMPTS):
    with torch.no_grad():
        return DeterministicSampler(STEPS, samples=1).sample(policy, policy.encode(prompts), Progress(0, 1), Streams(3)).samples


def called(plain, name, policy, output="latent", size=(32, 32), **options):
    """The plain pipeline from the same noise."""
    noise = Streams(3).normals(policy.latent_shape, "rollout", [0, 1], [0, 0])
    options = {"num_inference_steps": STEPS, "height": size[0], "width": size[1], **options}
    if CALLS[name].length is not None:
        options["max_sequence_length"] = CALLS[name].length
    if name == "sana":
        options["use_resolution_binning"] = False
    latents = pack(noise) if name in PACKED else noise
    return plain(prompt=[str(prompt) for prompt in PROMPTS], latents=latents, output_type=output, **options).images


def compared(name, policy, samples, latents):
    """Samples of a policy and latents of a pipeline, in the same units."""
    if name in PACKED:
        return samples, unpack(latents, *policy.latent_shape[1:])
    if name == "flux2-klein":  # its pipeline gives back what the autoencoder decodes
        return policy.family.unscale(samples), latents
    if name.startswith("sd15") or name == "sdxl":  # on the unit variance of the diffusion, not on the path of the flow
        return policy.family.unscale(samples) * policy.family.pipeline.vae.config.scaling_factor, latents
    return samples, latents


def assert_equal(name, policy, samples, latents):
    ours, theirs = compared(name, policy, samples, latents)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_deterministic_samples_are_those_of_the_plain_pipeline(plain, name, base):
    samples = sample(base)
    assert_equal(name, base, samples, called(plain, name, base, **CALLS[name].plain))
    assert (samples - base.prior(Streams(3).normals(base.latent_shape, "rollout", [0, 1], [0, 0]))).abs().max() > 0.1


@ONE_EACH
def test_decoded_pictures_are_those_of_the_plain_pipeline(plain, name, base):
    with torch.no_grad():
        images = base.decode(sample(base))
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, called(plain, name, base, "pt", **CALLS[name].plain), rtol=0, atol=1e-4)


def test_the_scale_that_is_no_guidance_gives_the_positive_velocity(base):
    positive, negative = torch.randn(2, 2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(base.guide(positive, negative, base.no_guidance), positive)
    assert not torch.allclose(base.guide(positive, negative, base.no_guidance + 1), positive)


def test_guided_samples_are_those_of_the_plain_pipeline(plain, name, base):
    call = CALLS[name]
    guided = sample(Guided(base, call.scale, call.negative))
    assert_equal(name, base, guided, called(plain, name, base, **call.guided))
    assert (guided - sample(base)).abs().max() > 1e-3  # the negative text matters


@ONE_EACH
def test_another_aspect_ratio_is_that_of_the_plain_pipeline(plain, name, folder):
    policy = load(folder, name, resolution=[64, 32])
    assert policy.latent_shape[1] == 2 * policy.latent_shape[2]
    assert_equal(name, policy, sample(policy), called(plain, name, policy, size=(64, 32), **CALLS[name].plain))


@ONE_EACH
def test_forward_and_backward_are_finite_also_with_checkpointing(name, folder):
    gradients = []
    for checkpointing in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            policy = load(folder, name, checkpointing=checkpointing)
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.fill_(0.05)
        latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        velocity = policy.velocity(latents, torch.tensor([0.9, 0.3]), policy.encode(PROMPTS))
        assert velocity.shape == latents.shape
        assert velocity.isfinite().all()
        velocity.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None]))
        assert gradients[-1].isfinite().all()
        assert (gradients[-1] != 0).float().mean() > 0.5
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@ONE_EACH
def test_two_steps_of_tmpo_move_the_adapters_alone(name, folder):
    policy = load(folder, name)
    before = {key: parameter.detach().clone() for key, parameter in policy.network.named_parameters()}
    loop = AlignmentLoop(SoftmaxTB(policy, rows=4), TREE, channel_reward, Prompts(PROMPTS), prompts_per_step=1, check_rows=100)
    for step in range(2):
        report = loop.step(PROMPTS[step:][:1], Progress(step, 2))
        assert report.metrics["contract/deviation"] < 1e-4
    moved = {key for key, parameter in policy.network.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved
    assert moved <= policy.own


@pytest.mark.parametrize(
    "name", [name for name in BUILD if name in CALLS and name not in ("flux-schnell", "sd15", "sd15-v", "sdxl")], indirect=True
)
def test_two_steps_of_tdm_r1_move_the_student(name, folder):
    student = TDMPolicy(load(folder, name), steps=2)
    before = {key: parameter.detach().clone() for key, parameter in student.named_parameters()}
    objective = SurrogateReward(student)
    loop = AlignmentLoop(objective, DeterministicSampler(2, samples=2), channel_reward, Prompts(PROMPTS[:1]), prompts_per_step=1)
    loop.run(2)
    moved = {key for key, parameter in student.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved
    assert moved <= student.own_parameters().keys()


@ONE_EACH
def test_a_text_is_encoded_alike_in_any_company(name, base):
    latents = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    sigma = torch.tensor([0.7, 0.7])
    with torch.no_grad():
        together = base.velocity(latents, sigma, base.encode(PROMPTS))
        for index, prompt in enumerate(PROMPTS):
            alone = base.velocity(latents[:1], sigma[:1], base.encode([prompt]))
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


@ONE_EACH
def test_a_bfloat16_base_keeps_float32_adapters(name, folder):
    policy = load(folder, name, dtype="bfloat16")
    kinds = {key in policy.own: parameter.dtype for key, parameter in policy.network.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    latents = torch.randn(2, *policy.latent_shape)
    velocity = policy.velocity(latents, torch.tensor([0.9, 0.3]), policy.encode(PROMPTS))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()
    gradients = torch.autograd.grad(velocity.square().mean(), list(policy.trainable_parameters().values()), allow_unused=True)
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in gradients if part is not None)


def test_flux2_dev_has_guidance_as_an_input():
    plain = built(flux2_dev)
    policies = [
        FlowMatchingPolicy(plain.transformer, Flux2(plain, Setting((32, 32), max_sequence_length=400, guidance=guidance)), own=())
        for guidance in (None, 7.0)
    ]
    for policy, scale in zip(policies, (4.0, 7.0), strict=True):
        noise = Streams(3).normals(policy.latent_shape, "rollout", [0, 1], [0, 0])
        options = {"height": 32, "width": 32, "num_inference_steps": STEPS, "max_sequence_length": 400, "guidance_scale": scale}
        latents = plain(prompt=[str(prompt) for prompt in PROMPTS], latents=noise, output_type="latent", **options).images
        torch.testing.assert_close(sample(policy), latents.transpose(1, 2).reshape(noise.shape), rtol=0, atol=1e-4)
    assert (sample(policies[0]) - sample(policies[1])).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"this FLUX.2 is distilled, so it cannot be guided by a second text"):
        sample(Guided(policies[0], 4.0))


@pytest.mark.parametrize(("name", "family", "usual"), [("sd15", StableDiffusion, 7.5), ("sdxl", StableDiffusionXL, 5.0)], indirect=["name"])
def test_a_unet_may_have_guidance_as_an_input(name, family, usual):
    plain = built(BUILD[name])
    config = {key: value for key, value in plain.unet.config.items() if not key.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain.register_modules(unet=UNet2DConditionModel(**{**config, "time_cond_proj_dim": 8}).eval())
    drawn = []
    for guidance, scale in ((None, usual), (1.0, 1.0), (8.0, 8.0)):
        policy = FlowMatchingPolicy(plain.unet, family(plain, Setting((32, 32), guidance=guidance)), own=())
        drawn.append(sample(policy))
        assert_equal(name, policy, drawn[-1], called(plain, name, policy, guidance_scale=scale))
    assert min((one - other).abs().max() for one, other in pairwise(drawn)) > 1e-2
