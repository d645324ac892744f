"""The flow as a policy: the package's contract, prompts, files, forks, guidance, a second device, few-step students."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.core import CPS, CheckpointError, Guided, Progress, Prompt, Streams
from diffalign.digits import DigitsPolicy
from diffalign.digits.networks import VelocityNetwork
from diffalign.digits.policy import EMBEDDED
from diffalign.policies import FlowMatchingPolicy
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import check_policy, second_device

TEXTS = ("a seven", "a thin even digit", "a seven")


def tiny():
    return DigitsPolicy(VelocityNetwork(width=8, depth=1))


def velocity(policy, texts=("a digit", "a thick seven", ""), sigma=0.6):
    noise = policy.prior(torch.randn(len(texts), 1, 8, 8, generator=torch.Generator().manual_seed(3)))
    condition = policy.encode([Prompt(text) for text in texts])
    with torch.no_grad():
        return policy.velocity(noise, torch.full((len(texts),), sigma, device=policy.device), condition)


def test_it_keeps_the_contract_of_policies(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    findings = check_policy(base)
    assert {finding.name for finding in findings} >= {"rows apart", "forks", "a second device"}
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_prompts_are_what_the_network_is_told():
    condition = tiny().encode([Prompt("a thick odd digit"), Prompt(""), Prompt("a digit"), Prompt("a thin two")])
    assert condition.tensors["classes"].tolist() == [[0, 1] * 5, [0] * 10, [1] * 10, [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert condition.tensors["thickness"].tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]
    with pytest.raises(ValueError, match="'three red circles' is no prompt of digits"):
        tiny().encode([Prompt("three red circles")])


def test_each_prompt_has_a_velocity_of_its_own(base):
    rows = velocity(base, ("a digit", "", "a seven", "a thin seven", "a thick seven", "an odd digit")).flatten(1)
    same = velocity(base, ("a digit",) * 6).flatten(1)
    assert torch.allclose(rows[0], same[0], atol=1e-5)
    assert ((rows - same).norm(dim=1)[1:] > 0.02).all()


def test_images_are_latents_enlarged(base):
    latents = torch.linspace(-1.2, 1.2, 64).view(1, 1, 8, 8)
    images = base.decode(latents)
    assert images.shape == (1, 3, 64, 64)
    assert torch.equal(images[:, :, ::8, ::8], ((latents + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1))
    assert torch.equal(images[:, :, 7::8, 7::8], images[:, :, ::8, ::8])


def test_the_grid_is_shifted():
    assert DigitsPolicy(VelocityNetwork(8, 1)).sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert DigitsPolicy(VelocityNetwork(8, 1), shift=3.0).sigmas(2).tolist() == pytest.approx([1, 0.75, 0])  # 3 s / (1 + 2 s)


def test_what_is_saved_is_loaded_to_the_bit(base, tmp_path):
    moved = base.fork(trainable=True)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    moved.save(str(tmp_path / "new" / "folder"))
    again = DigitsPolicy.from_pretrained(str(tmp_path / "new" / "folder"), CPS("sum"), shift=2.0, device="cpu")
    assert torch.equal(velocity(again), velocity(moved))
    assert not torch.equal(velocity(again), velocity(base))
    assert (again.kernel.density, again.shift) == ("sum", 2.0)


def test_half_precision_is_the_embedded_file(base, tmp_path):
    base.save(str(tmp_path), "float16")
    stored, mine = load_file(EMBEDDED / "velocity.safetensors"), load_file(tmp_path / "velocity.safetensors")
    assert stored.keys() == mine.keys()
    assert all(torch.equal(stored[name], mine[name]) for name in stored)
    assert json.loads((EMBEDDED / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}


def spoiled(folder, config=None, drop=None, reshape=None, garbage=False):
    tiny().save(str(folder))
    about = {**json.loads((folder / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps(about))
    tensors = load_file(folder / "velocity.safetensors")
    if drop:
        del tensors[drop]
    if reshape:
        tensors[reshape] = tensors[reshape][:1].clone()
    save_file(tensors, folder / "velocity.safetensors")
    if garbage:
        (folder / "velocity.safetensors").write_bytes(b"nothing")
    return folder


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"config": {"world": "shapes"}}, ['must name the world "digits"', "'shapes'", "its own policy"]),
        ({"config": {"width": 16}}, ["must hold the", "has"]),
        ({"config": {"depth": "one"}}, ["depth must be a whole number from 1 on", "'one'"]),
        ({"config": {"width": None}}, ["width must be a whole number from 4 on", "None"]),
        ({"drop": "time.weight"}, ["1 differ", "'time.weight'", "(8, 16)", "None"]),
        ({"reshape": "time.weight"}, ["1 differ", "'time.weight'", "(8, 16)", "(1, 16)"]),
        ({"garbage": True}, ["must be a safetensors file"]),
    ],
)
def test_other_files_are_refused(tmp_path, fault, words):
    with pytest.raises(CheckpointError) as error:
        DigitsPolicy.from_pretrained(str(spoiled(tmp_path, **fault)), device="cpu")
    assert str(tmp_path) in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_whoever_asks_for_the_other_world_is_told_its_policy():
    with pytest.raises(CheckpointError, match=r"ShapeWorld's pipeline is loaded by FlowMatchingPolicy.from_pretrained\.$"):
        DigitsPolicy.from_pretrained("shapeworld", device="cpu")
    with pytest.raises(
        ValueError, match=r"got 'digits': the embedded flow of digits is no pipeline; DigitsPolicy.from_pretrained loads it$"
    ):
        FlowMatchingPolicy.from_pretrained("digits", device="cpu")
    with pytest.raises(CheckpointError, match=r'or "digits" for the embedded one\.$'):
        DigitsPolicy.from_pretrained("nowhere", device="cpu")


def test_folders_without_a_flow_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold a flow of digits.*DigitsPolicy.save"):
        DigitsPolicy.from_pretrained(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(CheckpointError, match="SD3Transformer2DModel"):
        DigitsPolicy.from_pretrained(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="device must be one that torch finds"):
        DigitsPolicy.from_pretrained(device="nowhere")


def test_all_weights_are_trained_and_a_teacher_is_frozen(base):
    count = sum(parameter.numel() for parameter in base.trainable_parameters().values())
    assert count == sum(parameter.numel() for parameter in base.parameters())
    assert 1.0e6 < count < 1.4e6
    teacher = DigitsPolicy.from_pretrained(device="cpu", trainable=False)
    assert not teacher.trainable_parameters()
    assert torch.equal(velocity(teacher), velocity(base))
    assert len(teacher.fork(trainable=True).trainable_parameters()) == len(base.trainable_parameters())
    with pytest.raises(ValueError, match=r"needs LoRA adapters to leave out.*trainable=False"):
        base.fork(pristine=True)


def test_a_fork_shares_nothing(base):
    fork = base.fork(trainable=True)
    assert not {parameter.data_ptr() for parameter in fork.parameters()} & {parameter.data_ptr() for parameter in base.parameters()}


def test_guidance_leads_away_from_the_empty_prompt(base):
    guided = velocity(Guided(base, 3.0), TEXTS)
    plain, nothing = velocity(base, TEXTS), velocity(base, ("",) * 3)
    torch.testing.assert_close(guided, nothing + 3 * (plain - nothing), rtol=1e-4, atol=1e-4)


def test_a_prompts_pictures_do_not_depend_on_the_others(base):
    sampler, texts = DeterministicSampler(4, samples=2), [Prompt("a four"), Prompt("an even digit")]
    with torch.no_grad():
        both = sampler.sample(base, base.encode(texts), Progress(0, 1), Streams(5)).samples
        alone = sampler.sample(base, base.encode(texts[:1]), Progress(0, 1), Streams(5)).samples
    torch.testing.assert_close(both[:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[2:], alone, atol=0.1)


def test_a_tree_on_a_second_device_is_that_of_the_cpu(base):
    sampler = TreeSampler(4, FixedPlan((1,), branches=2))
    with torch.no_grad():
        here = sampler.sample(base, base.encode([Prompt("a seven")]), Progress(0, 1), Streams(2))
        with second_device():
            there = base.fork().to("far")
            forest = sampler.sample(there, there.encode([Prompt("a seven")]), Progress(0, 1), Streams(2))
            assert forest.latents.device.type == "far"
            images = there.decode(forest.samples)
            assert images.device.type == "far"
            torch.testing.assert_close(images.cpu(), base.decode(here.samples), rtol=1e-4, atol=1e-4)
