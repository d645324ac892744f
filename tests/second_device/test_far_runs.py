"""The command line with the policy there, and runs that stop on one device and go on, on it or on another."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import saved

sys.path.insert(0, str(Path(__file__).parents[1]))

sys.path.insert(0, str(Path(__file__).parents[1] / "shapeworld"))

import test_exact_resume as exact
import test_student

from diffalign.cli import main
from diffalign.core import Interrupted, Progress, Prompt, Streams
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy

RUN = """
policy:
  class_path: FlowMatchingPolicy.from_pretrained
  init_args: {{path: {path}, resolution: 32, max_sequence_length: 24, lora: {{rank: 2}}, cache: cache}}
objective: SoftmaxTB
sampler:
  class_path: TreeSampler
  init_args: {{steps: 3, plan: {{class_path: FixedPlan, init_args: {{splits: [0, 1], branches: 2}}}}}}
rewards: {{red: far_parts.red}}
prompts: {{class_path: PromptFile, init_args: {{path: prompts.txt}}}}
prompts_per_step: 1
average: {{class_path: Average, init_args: {{decay: 0.5}}}}
optimizers: {{default: {{class_path: torch.optim.SGD, init_args: {{lr: 0.5}}}}}}
evaluation: {{class_path: HeldOutEvaluation, init_args: {{path: held-out.txt, every: 1, samples: 2, steps: 2}}}}
checkpoint_every: 1
total: 2
"""
THERE = ["--policy.device", "far"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, tmp_path_factory):
    (tmp_path / "tiny.yaml").write_text(RUN.format(path=saved(tmp_path_factory, "sd3")).replace("path: held-out", "prompts: held-out"))
    (tmp_path / "far_parts.py").write_text("def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    for name in ("prompts", "held-out"):
        (tmp_path / f"{name}.txt").write_text("a red cube\ntwo cats\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "far_parts", raising=False)
    return tmp_path


def trained(folder, *more):
    assert main(["train", "tiny.yaml", "--folder", folder, *more]) == 0
    return load_file(f"{folder}/step-000002/policy.safetensors")


def close(one, other, tolerance=1e-4):
    assert one.keys() == other.keys()
    norm = sum(float(tensor.norm()) for tensor in other.values())
    assert norm > 0
    assert sum(float((one[name] - tensor).norm()) for name, tensor in other.items()) <= tolerance * norm


def test_a_run_and_all_that_is_made_of_it(workplace, capsys):
    there, here = trained("there", *THERE), trained("here", "--policy.device", "cpu")
    close(there, here)
    lora = load_file("there/lora/pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)
    results = [json.loads((workplace / folder / "evaluation.json").read_text())[-1] for folder in ("there", "here")]
    assert results[0]["rewards"]["red"] == pytest.approx(results[1]["rewards"]["red"], rel=1e-4)
    capsys.readouterr()

    assert main(["check", "there"]) == 0
    assert "device: far" in capsys.readouterr().out
    assert main(["sample", "there", "--prompt", "a cat", "--n", "2", "--steps", "2", "--out", "there.png"]) == 0
    assert main(["sample", "there", *["--policy.device", "cpu"], "--prompt", "a cat", "--n", "2", "--steps", "2", "--out", "cpu.png"]) == 0
    assert pixels("there.png").float().sub(pixels("cpu.png").float()).abs().max() <= 1
    assert main(["evaluate", "there", "--samples", "2"]) == 0
    found = json.loads((workplace / "there/evaluations/step-000002/evaluation.json").read_text())
    assert found["rewards"]["red"] == pytest.approx(results[0]["rewards"]["red"], rel=1e-4)
    assert main(["compare", "there", "here", "--samples", "2", "--out", "page"]) == 0
    assert list((workplace / "page").glob("*.html"))
    assert main(["bundle", "there"]) == 0
    with zipfile.ZipFile("there-bundle.zip") as archive:
        assert "evaluation.json" in archive.namelist()


def pixels(file):
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(file)))


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "merged"])
def test_exported_weights_are_those_of_a_policy_on_the_cpu(form, workplace):
    offload = ["--policy.offload", str(form == "merged").lower()]  # safetensors takes the rest of a pipeline from the CPU or a GPU alone
    trained("run", *THERE, *offload, "--evaluation", "null")
    files = {}
    for device in ("far", "cpu"):
        assert main(["export", "run", "--policy.device", device, "--format", form, "--out", device]) == 0
        files[device] = {path.relative_to(device): load_file(path) for path in Path(device).rglob("*.safetensors")}
    assert files["far"].keys() == files["cpu"].keys() != set()
    for file, tensors in files["cpu"].items():
        assert files["far"][file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(files["far"][file][name], tensor, msg=name)


def test_a_run_goes_on_there_and_elsewhere(workplace):
    unmeasured = ["--evaluation", "null"]
    whole = trained("whole", *THERE, *unmeasured)
    for first, second in (("far", "far"), ("far", "cpu"), ("cpu", "far")):
        folder = f"{first}-{second}"
        assert main(["train", "tiny.yaml", "--folder", folder, "--policy.device", first, "--total", "1", *unmeasured]) == 0
        again = ["--policy.device", second, "--total", "2", "--resume", "--new-total", *unmeasured]
        assert main(["train", "tiny.yaml", "--folder", folder, *again]) == 0
        resumed = load_file(f"{folder}/step-000002/policy.safetensors")
        if (first, second) == ("far", "far"):
            assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
        close(resumed, whole)


@pytest.mark.parametrize(("device", "reason"), [("cuda", "not compiled"), ("nonsense", "Expected one of cpu"), ("cpu:x", "nvalid")])
@pytest.mark.parametrize("command", ["train", "check"])
def test_a_device_that_is_not_there_is_one_message(command, device, reason, workplace, capsys):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    run = (workplace / "tiny.yaml").read_text().replace("far_parts.red", "CLIPScore").replace("path: /", "path: /nowhere/")
    (workplace / "tiny.yaml").write_text(run)  # neither the reward nor the policy could be loaded
    assert main([command, "tiny.yaml", "--policy.device", device]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: policy: device must be one that torch finds on this machine (cpu, far:0) or auto; got {device!r}: ")
    assert reason in said
    assert said.count("\n") == 1
    assert not (workplace / "runs").exists()
    with pytest.raises(ValueError, match="device must be one that torch finds on this machine"):
        FlowMatchingPolicy.from_pretrained("/nowhere", device=device)


def test_a_device_inside_a_wrapper_is_judged_too(workplace, capsys):
    text = (workplace / "tiny.yaml").read_text()
    inner = "{class_path: FlowMatchingPolicy.from_pretrained, init_args: {path: /nowhere, device: gpu}}"
    run = f"policy: {{class_path: Guided, init_args: {{scale: 2.0, policy: {inner}}}}}\nobjective: {text.partition('objective: ')[2]}"
    (workplace / "wrapped.yaml").write_text(run)
    assert main(["check", "wrapped.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: policy.policy: device must be one that torch finds on this machine")


def test_a_server_is_told_at_once(workplace, capsys):
    (workplace / "reward.yaml").write_text("JPEGCompressibility\n")
    assert main(["serve-reward", "reward.yaml", "--port", "0", "--device", "gpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: serve-reward: device must be one that torch finds on this machine (cpu, far:0) or auto; got 'gpu': ")


# --- checkpoints, in closed form -------------------------------------------------------------------------------------------------


@pytest.fixture
def on(monkeypatch):
    """The small policies of the other tests of resuming, on a device."""

    def choose(device):
        monkeypatch.setattr(exact, "TinyPolicy", lambda *args, **options: TinyPolicy(*args, **options).to(device))

    return choose


RESUMED = ["SoftmaxTB", "DiffusionNFT", "TDM-R1", "Follower"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_whole_one(name, on, tmp_path):
    on("far")
    whole, resumed = exact.whole_and_resumed(name, tmp_path)
    mine = exact.tensors(resumed)
    for key, expected in exact.tensors(whole).items():
        assert mine[key].device == expected.device == torch.device("far", 0), key
        assert torch.equal(mine[key], expected), key
    for role, optimizer in resumed.running.items():
        entries = optimizer.state_dict()["state"].values()
        assert {entry["exp_avg"].device.type for entry in entries} == {"far"}, role
    assert resumed.reward == whole.reward


@pytest.mark.parametrize(("first", "second"), [("far", "cpu"), ("cpu", "far")])
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_read_on_another_device(name, first, second, on, tmp_path):
    on("cpu")
    whole, _ = exact.build(name, tmp_path / "whole")
    whole.run(4)
    on(first)
    begun, _ = exact.build(name, tmp_path / "parts", [exact.InterruptAfter(2)])
    with pytest.raises(Interrupted):
        begun.run(4)
    on(second)
    resumed, checkpoints = exact.build(name, tmp_path / "parts")
    resumed.run(4, checkpoints.restore(resumed))
    mine = exact.tensors(resumed)
    for key, expected in exact.tensors(whole).items():
        assert mine[key].device.type == second
        torch.testing.assert_close(mine[key].cpu(), expected, rtol=1e-5, atol=1e-6, msg=key)


def test_a_checkpoint_holds_nothing_of_the_device(on, tmp_path):
    """It is read where there is no such device."""
    on("far")
    loop, _ = exact.build("TDM-R1", tmp_path / "run")
    loop.run(1)

    def leaves(thing):
        if isinstance(thing, torch.Tensor):
            yield thing
        for inner in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ():
            yield from leaves(inner)

    files = list((tmp_path / "run" / "step-000001").glob("*.pt"))
    tensors = [tensor for file in files for tensor in leaves(torch.load(file, weights_only=True))]
    assert len(files) >= 4
    assert len(tensors) > 10
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


# --- files of students and adapters ----------------------------------------------------------------------------------------------


def policy_on(device, path):
    torch.manual_seed(0)
    return FlowMatchingPolicy.from_pretrained(path, lora=LoRA(rank=2), resolution=32, max_sequence_length=24, device=device)


def pictures(policy, steps):
    with torch.no_grad():
        sampler = DeterministicSampler(steps, samples=2)
        forest = sampler.sample(policy, policy.encode([Prompt("a red cube")]), Progress(0, 1), Streams(3))
        return policy.decode(forest.samples).cpu()


@pytest.mark.parametrize(("first", "second"), [("far", "far"), ("far", "cpu"), ("cpu", "far")])
def test_a_student_that_was_saved_there(first, second, tmp_path, tmp_path_factory):
    path = saved(tmp_path_factory, "sd3")
    student = TDMPolicy(policy_on(first, path), steps=2)
    with torch.no_grad():
        for parameter in student.trainable_parameters().values():
            parameter += 0.1
    student.save(str(tmp_path / "student"))
    again = TDMPolicy.from_saved(policy_on(second, path), str(tmp_path / "student"))
    assert again.base_digest() == student.base_digest()
    assert again.device.type == second
    torch.testing.assert_close(pictures(again, 2), pictures(student, 2), rtol=1e-4, atol=1e-4)
    adapters = load_file(tmp_path / "student" / "pytorch_lora_weights.safetensors")
    mine = student.gathered()
    assert len(adapters) == len(mine)
    assert sorted(float(tensor.sum()) for tensor in adapters.values()) == pytest.approx(sorted(float(t.sum()) for t in mine.values()))


def test_the_student_of_the_package_is_the_same_there():
    student = {
        device: TDMPolicy.from_saved(test_student.base(f"--policy.policy.device={device}", "--policy.policy.compute=null"), "shapeworld")
        for device in ("far", "cpu")
    }
    torch.testing.assert_close(pictures(student["far"], 4), pictures(student["cpu"], 4), rtol=1e-3, atol=1e-3)


def test_the_run_of_a_gpu_with_fewer_pictures(capsys):
    fewer = ["--prompts_per_step", "2", "--sampler.samples", "2", "--total", "2", "--objective.plan.warmup", "0", "--evaluation", "null"]
    there = ["--policy.policy.device", "far", "--policy.policy.compute", "null", "--folder", "few"]
    assert main(["train", "shapeworld_tdm_r1_gpu", "--rewards.exact.workers", "2", *fewer, *there]) == 0
    lines = [json.loads(line) for line in Path("few/metrics.jsonl").read_text().splitlines()]
    samples, stages = 2 * 2, 2  # of two prompts; the student rolls out in four stages, trains two, and does not rest
    assert [line["rows/policy/update"] for line in lines] == [samples * stages] * 2, lines[0]
    assert all(0 <= line["reward"] <= 1 for line in lines)
    assert any(tensor.any() for tensor in load_file("few/step-000002/surrogate.safetensors").values())
