"""A tiny random Stable Diffusion 3 as a policy, held against the plain diffusers pipeline."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffalign import AlignmentLoop, Prompt, config
from diffalign.core import CPS, Edges, FlowSDE, Guided, Progress, ShiftedGrid, Streams, check_first_step
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, DeterministicSampler, TreeSampler
from diffalign.shapeworld.networks import pipeline
from diffalign.testing import GivenPlan, channel_reward

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares")]
LENGTH = 16
TREE = TreeSampler(4, GivenPlan(Branching((1, 2, 2, 1), (0.0, 0.7, 0.7, 0.0))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-sd3")
    model = pipeline(layers=1, heads=1)
    model.set_progress_bar_config(disable=True)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def load(folder):
    def load(lora=LoRA(rank=2, alpha=6), length=LENGTH, **options):  # noqa: B008  a frozen value
        return FlowMatchingPolicy.from_pretrained(folder, lora=lora, max_sequence_length=length, device="cpu", **options)

    return load


def moved(policy, seed=0, by=0.2):
    """Away from the pipeline's own weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return policy


def inputs(policy, count=2):
    latents = torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, torch.linspace(0.9, 0.2, count), policy.encode([PROMPTS[index % 2] for index in range(count)])


def velocity(policy):
    with torch.no_grad():
        return policy.velocity(*inputs(policy))


def sample(policy, sampler, ids=(0, 1)):
    with torch.no_grad():
        return sampler.sample(policy, policy.encode([PROMPTS[index] for index in ids]), Progress(0, 1), Streams(3))


def plainly(folder, lora=None, **options):
    """The plain pipeline from the same noise."""
    model = StableDiffusion3Pipeline.from_pretrained(folder)
    model.set_progress_bar_config(disable=True)
    if lora is not None:
        model.load_lora_weights(lora)
    noise = Streams(3).normals((8, 16, 16), "rollout", [0, 1], [0, 0])
    texts = [str(prompt) for prompt in PROMPTS]
    options = {"guidance_scale": 1.0, "max_sequence_length": LENGTH, "num_inference_steps": 4, **options}
    return model(texts, latents=noise, **options).images


@pytest.mark.parametrize("lora", [None, LoRA(rank=2), LoRA(rank=2, init="zero")])
def test_deterministic_samples_are_those_of_the_plain_pipeline(folder, load, lora):
    policy = load(lora=lora)
    forest = sample(policy, DeterministicSampler(4, samples=1))
    torch.testing.assert_close(forest.samples, plainly(folder, output_type="latent"), rtol=0, atol=1e-4)
    torch.testing.assert_close(policy.decode(forest.samples), plainly(folder, output_type="pt"), rtol=0, atol=1e-4)


def test_guided_samples_are_those_of_the_plain_pipeline(folder, load):
    policy = Guided(load(), 4.0, negative="a text")
    expected = plainly(folder, guidance_scale=4.0, negative_prompt=["a text"] * 2, output_type="latent")
    torch.testing.assert_close(sample(policy, DeterministicSampler(4, samples=1)).samples, expected, rtol=0, atol=1e-4)
    assert (expected - plainly(folder, output_type="latent")).abs().max() > 1e-2


def test_the_usual_text_length_is_that_of_the_plain_pipeline(folder, load):
    policy = load(length=None)
    assert policy.encode(PROMPTS).tensors["embeds"].shape == (2, 16 + 256, 128)
    expected = plainly(folder, max_sequence_length=256, output_type="latent", num_inference_steps=2)
    torch.testing.assert_close(sample(policy, DeterministicSampler(2, samples=1)).samples, expected, rtol=0, atol=1e-4)


def test_saved_adapters_load_into_plain_diffusers_with_equal_images(folder, load, tmp_path):
    policy = moved(load())
    policy.save_lora(str(tmp_path))
    policy_images = policy.decode(sample(policy, DeterministicSampler(4, samples=1)).samples)
    torch.testing.assert_close(plainly(folder, lora=str(tmp_path), output_type="pt"), policy_images, rtol=0, atol=1e-4)
    assert (plainly(folder, output_type="pt") - policy_images).abs().max() > 1e-2  # the adapters matter, and so does their alpha


def test_lora_freezes_the_base_and_trains_the_named_layers_in_float32(load):
    policy = load()
    trained = policy.trainable_parameters()
    assert {name.removeprefix("network.") for name in trained} == policy.own
    assert {name.split(".lora_")[0].split("attn.")[1] for name in trained} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert len(load(lora=LoRA(rank=2, targets=["proj_out"])).own) == 2
    assert len(load(lora=None).own) == len(list(load(lora=None).network.parameters()))


def test_forks_share_frozen_tensors_by_identity(load):
    policy = load()
    forks = [policy.fork(trainable=True), policy.fork(), policy.fork(pristine=True)]
    forks.append(forks[0].fork())
    mine = dict(policy.network.named_parameters())
    for fork in forks:
        theirs = dict(fork.network.named_parameters())
        assert mine.keys() == theirs.keys()
        assert {name for name in mine if mine[name] is not theirs[name]} == policy.own
        assert fork.network.pos_embed is policy.network.pos_embed
        assert fork.family is policy.family
    assert len(mine) > 5 * len(policy.own)


def test_moving_one_fork_moves_no_other(load):
    policy = moved(load())
    first, second = policy.fork(trainable=True), policy.fork(trainable=True)
    start = velocity(policy)
    assert torch.equal(velocity(first), start)
    moved(first, seed=1)
    assert not torch.equal(velocity(first), start)
    assert torch.equal(velocity(policy), start)
    assert torch.equal(velocity(second), start)


def test_a_pristine_fork_is_the_base(load):
    base = velocity(load(lora=None))
    policy = moved(load())
    assert not torch.allclose(velocity(policy), base, atol=1e-3)
    torch.testing.assert_close(velocity(policy.fork(pristine=True)), base, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(velocity(load()), base, rtol=1e-5, atol=1e-6)


def test_what_would_move_every_fork_is_refused(load):
    policy = load()
    twin = policy.fork()
    for each in (policy, twin):
        with pytest.raises(RuntimeError, match="would change every fork"):
            each.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="would change every fork"):
            each.requires_grad_(True)
    assert not twin.trainable_parameters()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_of_forks_interleave_also_under_activation_checkpointing(load, checkpointing):
    policy, calls = moved(load()), []
    policy.network.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(1))  # owns nothing: one module to all forks

    def gradients(*policies):
        calls.clear()
        for each in policies:
            each.zero_grad(set_to_none=True)
        losses = [each.velocity(*inputs(each)).square().mean() for each in policies]
        for loss in losses:
            loss.backward()
        return [torch.cat([p.grad.flatten() for p in each.trainable_parameters().values()]) for each in policies]

    (plain,) = gradients(policy)
    if checkpointing:
        policy.network.enable_gradient_checkpointing()
    other = moved(policy.fork(trainable=True), seed=1)
    alone = *gradients(policy), *gradients(other)
    torch.testing.assert_close(alone[0], plain, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(*alone)
    for expected, got in zip(alone, gradients(policy, other), strict=True):
        assert torch.equal(got, expected)
    assert len(calls) == (4 if checkpointing else 2)


def test_texts_are_encoded_once_and_alike_in_any_company(load, monkeypatch):
    policy, asked = load(), []
    encode = policy.family.encode
    monkeypatch.setattr(policy.family, "encode", lambda texts: asked.append(list(texts)) or encode(texts))
    together = policy.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    again = policy.fork().encode([PROMPTS[0]])
    assert asked == [["two blue squares", "a red circle"]]
    assert together.prompts == (PROMPTS[1], PROMPTS[0], PROMPTS[1])
    assert together.ids.tolist() == [0, 1, 2]
    fresh = load().encode([PROMPTS[0]])
    for name in ("embeds", "pooled"):
        assert torch.equal(again.tensors[name][0], together.tensors[name][1])
        torch.testing.assert_close(fresh.tensors[name][0], together.tensors[name][1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together.tensors["pooled"][0], together.tensors["pooled"][1], atol=1e-3)


def test_rows_are_counted_per_policy(load):
    policy = load()
    twin = policy.fork()
    velocity(policy)
    assert (policy.counter.rows, policy.counter.calls, twin.counter.rows) == (2, 1, 0)


def test_kernel_and_grid_can_be_chosen(load):
    policy = load()
    assert isinstance(policy.kernel, CPS)
    assert policy.sigmas(4)[0] == 1
    assert policy.sigmas(4)[-1] == 0
    assert policy.sigmas(4).dtype == torch.float32
    chosen = load(kernel=FlowSDE("sum"), grid=ShiftedGrid(3.0))
    for each in (chosen, chosen.fork()):
        assert each.kernel == FlowSDE("sum")
        assert torch.equal(each.sigmas(4), ShiftedGrid(3.0)(4))


def test_a_checkpoint_holds_the_adapters_or_everything(load):
    policy = load()
    assert policy.own_parameters().keys() == policy.trainable_parameters().keys()
    assert policy.fork().own_parameters().keys() == policy.own_parameters().keys()
    full = load(lora=None)
    assert full.own_parameters().keys() == dict(full.named_parameters()).keys()


def test_a_step_moves_the_adapters_alone_and_keeps_the_contract(load):
    policy = load()
    before = {name: parameter.detach().clone() for name, parameter in policy.network.named_parameters()}
    loop = AlignmentLoop(SoftmaxTB(policy, rows=3), TREE, channel_reward, Prompts(PROMPTS), prompts_per_step=2, check_rows=100)
    report = loop.step(PROMPTS, Progress(0, 1))
    assert report.metrics["contract/deviation"] < 1e-4
    assert report.images.shape == (8, 3, 64, 64)
    changed = {name for name, parameter in policy.network.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in policy.own if "lora_B" in name}  # with B = 0 the gradient of A is 0
    assert report.ledger.rows["policy/rollout"] == 2 * (1 + 1 + 2 + 4)
    assert report.ledger.rows["policy/update"] == 2 * (1 + 2)


def test_a_half_precision_base_keeps_float32_adapters_and_the_contract(load):
    policy = moved(load(dtype="bfloat16"))
    assert {parameter.dtype for name, parameter in policy.network.named_parameters() if name in policy.own} == {torch.float32}
    assert policy.network.pos_embed.proj.weight.dtype == torch.bfloat16
    forest = sample(policy, TREE)
    assert forest.latents.dtype == torch.float32
    assert check_first_step(policy, forest).deviation == 0.0
    assert len(Edges.of(forest).parent) == 2 * 3
    gradient = torch.autograd.grad(policy.velocity(*inputs(policy)).square().mean(), list(policy.trainable_parameters().values()))
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in gradient)


def test_all_weights_are_trained_in_float32_only(load):
    with pytest.raises(
        ValueError, match=r"dtype must be float32 when all weights are trained \(an optimizer loses small steps in bfloat16\)"
    ):
        load(lora=None, dtype="bfloat16")


def test_without_adapters_nothing_is_pristine_and_nothing_is_saved(load, tmp_path):
    policy = load(lora=None)
    with pytest.raises(ValueError, match="needs LoRA adapters to leave out; this policy trains all its weights"):
        policy.fork(pristine=True)
    with pytest.raises(ValueError, match="save_lora needs LoRA adapters; this policy trains all its weights"):
        policy.save_lora(str(tmp_path))
    twin = policy.fork(trainable=True)
    start = velocity(policy)
    moved(twin)
    assert torch.equal(velocity(policy), start)


def test_adapters_for_no_layer_are_refused(load):
    with pytest.raises(ValueError, match=r"'to_everything' names none \(nearest: '\w+'\)"):
        load(lora=LoRA(targets=["to_everything"]))


@pytest.mark.parametrize(
    ("targets", "odd", "nearest"),
    [
        (["attn.to_q", "attn.to_qq"], "attn.to_qq", "attn.to_q"),
        (["to_k", "atn.to_v"], "atn.to_v", "attn.to_v"),
        (["to_q", "ff.net.0"], "ff.net.0", "ff.net.2"),
        (
            ["transformer_blocks.0.attn.to_q", "transformer_blocks.77.attn.to_q"],
            "transformer_blocks.77.attn.to_q",
            r"transformer_blocks\.\d\.attn\.to_q",
        ),
        ("all-linear", "all-linear", r"\S+"),
        ("q", "q", r"\S+"),
    ],
)
def test_one_target_of_several_that_names_no_layer_is_refused_with_the_nearest(load, targets, odd, nearest):
    with pytest.raises(ValueError, match=rf"LoRA\.targets must each name a linear layer .*'{odd}' names none \(nearest: '{nearest}'\)"):
        load(lora=LoRA(rank=2, targets=targets))


def test_one_text_is_one_target_and_a_path_is_that_layer_alone(load):
    assert LoRA(targets="to_q").targets == ("to_q",)
    every = {name.split(".lora_")[0] for name in load(lora=LoRA(rank=2, targets="to_q")).own}
    assert every
    assert all(name.endswith(".to_q") for name in every)
    first = min(every)
    assert {name.split(".lora_")[0] for name in load(lora=LoRA(rank=2, targets=[first])).own} == {first}


@pytest.mark.parametrize(("typed", "targets"), [("to_q", ("to_q",)), ("[to_q, to_k]", ("to_q", "to_k")), ("null", None)])
def test_targets_are_typed_on_the_command_line_as_in_python(typed, targets):
    run = config.parse("shapeworld_tmpo", ["--policy.lora.targets", typed])
    lora = run.tree["policy"].arguments["lora"]
    assert lora.target(**lora.arguments).targets == targets
    assert config.parse_text(run.yaml()).tree == run.tree


@pytest.mark.parametrize(("options", "name"), [({"rank": 0}, "rank"), ({"alpha": 0}, "alpha")])
def test_numbers_out_of_range_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        LoRA(**options)


def test_a_path_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"policy.path must be a diffusers pipeline folder"):
        FlowMatchingPolicy.from_pretrained(str(tmp_path / "nowhere"), device="cpu")


def test_a_pipeline_of_an_unknown_family_is_refused_with_those_known(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MarigoldDepthPipeline", "_diffusers_version": "0.36.0"}))
    with pytest.raises(
        ValueError, match=r"is a MarigoldDepthPipeline, and no adapter serves that class. Known: .*StableDiffusion3Pipeline"
    ):
        FlowMatchingPolicy.from_pretrained(str(tmp_path), device="cpu")


def test_loading_a_pipeline_says_nothing_of_torchvision():
    code = """
from transformers.utils import logging
from diffalign.policies import FlowMatchingPolicy
before = logging.get_verbosity()
FlowMatchingPolicy.from_pretrained("shapeworld", device="cpu")
assert logging.get_verbosity() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout + done.stderr
