"""Measuring a policy that is there: the numbers of the CPU, whatever they are measured on; and what watches a run."""

import json
import math
import sys
from pathlib import Path

import attrs
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from ring import MODES
from test_features import preprocessing

from diffalign.core import AlignmentLoop, Average, Interrupted, NonFiniteError, Prompt
from diffalign.evaluation import CLIPFeatures, DINOv2Features, HackingAlarm, HeldOutEvaluation, PixelFeatures, ShapeWorldFeatures, evaluate
from diffalign.evaluation.diversity import cosine_distance, cosine_distance_across, effective_modes, modes, vendi_score
from diffalign.evaluation.ms_ssim import ms_ssim_distance
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import Checkpoints
from diffalign.runs.offending import keep_offending_batch
from diffalign.runs.snapshot import read_manifest
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.shapeworld.render import SIZE
from diffalign.testing import TinyPolicy, channel_reward

PROMPTS = [Prompt(text) for text in ("a", "bb", "ccc")]


class Pictures(TinyPolicy):
    """Subclassed for the test only: pictures of ShapeWorld's size, with ink where the sample says."""

    def decode(self, latents):
        dots = super().decode(latents).repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)
        place = torch.arange(SIZE, device=latents.device)
        inside = ((place - 20)[:, None].square() + (place - 30).square()) < 150
        return torch.where(inside, dots.lerp(dots.round(), 0.9), dots.new_tensor(1.0))


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    root = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7, "image_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(root / "dino")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**small, intermediate_size=8, projection_dim=6)).save_pretrained(root / "clip")
    for name in ("dino", "clip"):
        preprocessing(root / name, size={"shortest_edge": 14}, crop_size=14)
    return root


def measured(device, features, rows=128, dtype=torch.float64):
    policy = Pictures((3, 2), dtype=dtype).to(device)
    return evaluate(policy, PROMPTS, {"channel": channel_reward, "bright": brightness}, features=features, samples=3, steps=3, rows=rows)


def same(there, here):
    assert there.measures().keys() == here.measures().keys()
    for name, values in here.measures().items():
        assert there.measures()[name].device.type == "cpu"
        torch.testing.assert_close(there.measures()[name], values, rtol=1e-5, atol=1e-5, msg=name)
    assert there.across == pytest.approx(here.across, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(there.images, here.images)


FEATURES = {
    "pixels": lambda folder, device: PixelFeatures(),
    "shapeworld": lambda folder, device: ShapeWorldFeatures(),
    "dinov2": lambda folder, device: DINOv2Features(str(folder / "dino"), device=device, rows=4),
    "clip": lambda folder, device: CLIPFeatures(str(folder / "clip"), device=device, rows=4),
}


@pytest.mark.parametrize("features_on", ["far", "cpu"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_measure_of_every_feature_is_that_of_the_cpu(name, features_on, networks):
    there, here = (measured(device, {name: FEATURES[name](networks, on)}) for device, on in (("far", features_on), ("cpu", "cpu")))
    same(there, here)
    wanted = {"l_gmd", "ms_ssim_distance", *(f"{measure}/{name}" for measure in ("cosine", "vendi", "modes"))}
    assert there.diversity.keys() == wanted
    assert all(float(values.abs().max()) > 1e-4 for values in here.diversity.values()), "of nothing everything is equal"


MEASURES = {
    "cosine": cosine_distance,
    "cosine across": cosine_distance_across,
    "vendi": vendi_score,
    "modes": lambda features: torch.stack([modes(rows, 0.5) for rows in features]),
    "effective modes": lambda features: effective_modes((features[..., 0] > 0).long().flatten()),
    "ms-ssim": lambda features: ms_ssim_distance(
        features.sigmoid().unflatten(-1, (3, 1, 2)).repeat_interleave(20, 3).repeat_interleave(6, 4)
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_features_that_are_there_stays_there(name):
    features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    there, here = MEASURES[name](features.to("far")), MEASURES[name](features)
    assert there.device == torch.device("far", 0)
    assert here.double().abs().max() > 0.01
    torch.testing.assert_close(there.cpu(), here)


@pytest.mark.parametrize("rows", [3, 4])
def test_pieces_are_scored_where_the_policy_is(rows):
    seen = []

    def noting(images, prompts):
        seen.append((images.device.type, len(images), [str(prompt) for prompt in prompts]))
        return channel_reward(images, prompts)

    policy = TinyPolicy(dtype=torch.float64).to("far")
    found = evaluate(policy, PROMPTS, {"noting": noting}, samples=3, steps=3, rows=rows)
    assert {device for device, _, _ in seen} == {"far"}, "a network that follows the images would leave the device at each evaluation"
    assert all(len(prompts) == count <= rows for _, count, prompts in seen)
    assert [prompt for _, _, prompts in seen for prompt in prompts] == [str(prompt) for prompt in PROMPTS for _ in range(3)]
    whole = evaluate(TinyPolicy(dtype=torch.float64), PROMPTS, {"noting": channel_reward}, samples=3, steps=3)
    torch.testing.assert_close(found.rewards["noting"], whole.rewards["noting"])


def test_a_device_of_features_that_is_not_there_is_refused_at_once():
    for kind in (DINOv2Features, CLIPFeatures):
        with pytest.raises(ValueError, match="device must be one that torch finds on this machine"):
            kind("/nowhere", device="gpu")


# --- what watches a run ------------------------------------------------------------------------------------------------------


def run(device, folder=None, hooks=(), reward=channel_reward, policy=None, **settings):
    torch.manual_seed(0)
    return AlignmentLoop(
        objective=SoftmaxTB((policy or TinyPolicy((2, 2), dtype=torch.float64)).to(device)),
        sampler=TreeSampler(4, FixedPlan((1,), branches=3)),
        rewards=reward,
        prompts=Prompts(["left", "right", "up"]),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        folder=folder,
        hooks=hooks,
        **settings,
    )


def test_held_out_evaluation_of_the_average_and_the_best_checkpoint(tmp_path):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    found = {}
    for device in ("far", "cpu"):
        folder = tmp_path / device
        evaluation = HeldOutEvaluation(
            str(tmp_path / "held-out.txt"), every=1, samples=2, steps=3, rewards={"bright": brightness}, features={"p": PixelFeatures(2)}
        )
        loop = run(device, folder, [evaluation, Checkpoints(folder, every=2)], average=Average(0.5))
        loop.run(3)
        assert loop.average.policy.device.type == device
        found[device] = (evaluation.results, read_manifest(folder / "best"), json.loads((folder / "evaluation.json").read_text()))
        assert sorted(path.name for path in (folder / "images").iterdir())[-1] == "step-000003.png"
    there, here = found["far"], found["cpu"]
    assert [result.step for result in there[0]] == [0, 1, 2, 3]
    for mine, other in zip(there[0], here[0], strict=True):
        same(mine, other)
    assert not torch.equal(there[0][0].rewards["bright"], there[0][-1].rewards["bright"]), "it has trained"
    assert there[1]["score"] == pytest.approx(here[1]["score"])
    assert (there[1]["step"], there[1]["measure"]) == (here[1]["step"], here[1]["measure"])
    assert [entry["rewards"] for entry in there[2]] == [pytest.approx(entry["rewards"]) for entry in here[2]]


@attrs.define(eq=False)
class Fading:
    """A judge, with an answer on the images' device, whose marks fall by themselves from a call on."""

    calls: int = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return brightness(images, prompts) / 10 + 0.01 * (-1) ** self.calls - 0.5 * max(0, self.calls - 4)


@attrs.define(eq=False)
class Growing:
    """A trained reward that grows by itself."""

    calls: int = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return channel_reward(images, prompts) + self.calls


@pytest.mark.parametrize("action", ["warn", "temper", "stop"])
def test_the_alarm_rings_there_as_here(action, tmp_path, capsys):
    lines = {}
    for device in ("far", "cpu"):
        hook = HackingAlarm({"judge": Fading(), "bright": brightness}, action=action, window=2, images=5)
        loop = run(device, tmp_path / device, [hook], Growing())
        if action == "stop":
            with pytest.raises(Interrupted):
                loop.run(9)
        else:
            loop.run(9)
        lines[device] = [json.loads(line) for line in (tmp_path / device / "watch.jsonl").read_text().splitlines()]
        assert [alarm.kind for alarm in hook.alarms] == ["judge"]
        assert "HACKING ALARM" in capsys.readouterr().err
        assert (type(loop.aggregation).__name__ == "Tempered") == (action == "temper")
    for there, here in zip(lines["far"], lines["cpu"], strict=True):
        assert there.keys() == here.keys()
        assert there["trained"] == pytest.approx(here["trained"])
        for kind in ("held_out", "spread", "errors"):
            assert there[kind] == pytest.approx(here[kind], abs=1e-7)


def test_an_alarm_on_diversity_alone(tmp_path):
    lines = {}
    for device in ("far", "cpu"):
        policy = GaussianMixturePolicy(MODES, 0.3)
        run(device, tmp_path / device, [HackingAlarm()], brightness, policy).run(2)
        lines[device] = [json.loads(line)["diversity"] for line in (tmp_path / device / "watch.jsonl").read_text().splitlines()]
    assert lines["far"] == pytest.approx(lines["cpu"])
    assert len(lines["far"]) == 2


class Breaking(TinyPolicy):
    """Subclassed for the test only: a weight is lost before the second step."""

    after = math.inf

    def encode(self, prompts):
        self.after -= 1
        if self.after < 0:
            with torch.no_grad():
                self.network.lora_B.weight.fill_(float("nan"))
        return super().encode(prompts)


def test_a_batch_with_a_number_that_is_not_finite_is_kept(tmp_path):
    policy = Breaking((2, 2))
    policy.after = 1
    loop = run("far", tmp_path, policy=policy)
    with pytest.raises(NonFiniteError, match=r"role 'policy', step 1, rollout: latents are not finite at level 1") as caught:
        loop.run(3)
    file = keep_offending_batch(caught.value, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(file)
    assert tensors["latents"].device.type == "cpu"
    assert not tensors["latents"].isfinite().all()
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["step"] == 1
    assert "latents" in about["not_finite"]


def test_a_reward_that_is_not_finite_names_image_and_prompt(tmp_path):
    def broken(images, prompts):
        scores = brightness(images, prompts)
        scores[1] = float("inf")
        return scores

    with pytest.raises(NonFiniteError, match=r"broken returned inf for image 1 of 6, prompt '") as caught:
        run("far", tmp_path, reward=broken).run(1)
    assert keep_offending_batch(caught.value, tmp_path) is not None
