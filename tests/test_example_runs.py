"""The run files of the model families: their settings on tiny random pipelines, trained for two steps and exported."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_pipelines import saved

from diffalign import config
from diffalign.cli import main
from diffalign.core import Linear, Prompt
from diffalign.objectives import SoftmaxTB

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {"flux1_tmpo_pickscore": "flux-dev", "flux1_tmpo_geneval": "flux-dev", "flux1_tmpo_ocr": "flux-dev", "sd35_tmpo": "sd3"}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red cube\ntwo cats\n")
    (tmp_path / "rewards.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n\n"
        "def blue(images, prompts):\n    return images[:, 2].mean(dim=(1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def overrides(run, folder):
    """What takes a run's weights, prompts and rewards to something tiny; its settings stay."""
    names = yaml.safe_load((EXAMPLES / f"{run}.yaml").read_text())["rewards"]
    rewards = [f"--rewards.{name}={part}" for name, part in zip(names, ("rewards.red", "rewards.blue"), strict=False)]
    policy = ["--policy.path", folder, "--policy.resolution", "32", "--policy.max_sequence_length", "24", "--policy.dtype", "float32"]
    return [*policy, "--policy.device", "cpu", *rewards, "--prompts.path", "prompts.txt", "--evaluation", "null", "--prompts_per_step", "1"]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_passes_check_with_the_papers_settings(run, tmp_path_factory, capsys):
    assert main(["check", str(EXAMPLES / f"{run}.yaml"), *overrides(run, saved(tmp_path_factory, RUNS[run]))]) == 0
    printed = capsys.readouterr().out
    assert "27" in next(line for line in printed.splitlines() if line.startswith("leaves per prompt"))
    assert "lora" in printed


@pytest.mark.parametrize("run", RUNS)
def test_a_run_trains_and_its_weights_are_exported(run, tmp_path_factory, tmp_path, capsys):
    folder = tmp_path / "run"
    tiny = overrides(run, saved(tmp_path_factory, RUNS[run]))
    assert main(["train", str(EXAMPLES / f"{run}.yaml"), *tiny, "--total", "2", "--average.every=1", "--folder", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["contract/deviation"] < 1e-4 for line in lines)
    written = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in written.items() if "lora_B" in name)
    assert "SoftmaxTB" in (folder / "lora" / "README.md").read_text()
    assert list((tmp_path / "runs" / "encodings").rglob("*.safetensors"))  # nothing is encoded twice, not even by another run
    capsys.readouterr()
    for form, file in (
        ("diffusers", "pytorch_lora_weights.safetensors"),
        ("comfyui", "comfyui_lora.safetensors"),
        ("merged", "transformer/diffusion_pytorch_model.safetensors"),
    ):
        assert main(["export", str(folder), "--format", form]) == 0
        assert capsys.readouterr().out.strip() == str(folder / "export" / form)
        assert (folder / "export" / form / file).exists()
        assert "| training steps | 2 |" in (folder / "export" / form / "README.md").read_text()
    again = load_file(folder / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in written.items())  # lora/ is the same thing, at the end of every run


@pytest.mark.parametrize("run", RUNS)
def test_a_run_says_what_the_paper_reports_and_what_it_needs(run):
    text = (EXAMPLES / f"{run}.yaml").read_text()
    header = text[: text.index("\npolicy:")]
    for word in ("arXiv:2605.10983", "eport", "Needs:", "Hardware:", "train examples/" + run):
        assert word in header


def test_the_settings_of_the_release_arrive(tmp_path_factory):
    folder = saved(tmp_path_factory, "flux-dev")
    loop = config.parse(EXAMPLES / "flux1_tmpo_pickscore.yaml", overrides("flux1_tmpo_pickscore", folder)).build()
    policy, objective = loop.objective.policy, loop.objective
    assert isinstance(objective, SoftmaxTB)
    assert objective.beta == Linear(0.8, 2.0, 150)
    assert (objective.measure, objective.center, policy.kernel.density) == ("path", "none", "squared")
    assert (policy.family.guidance, policy.family.setting.offload) == (3.5, True)
    assert policy.network.is_gradient_checkpointing
    assert loop.running["policy"].defaults["lr"] == 5e-5
    assert policy.encode([Prompt("a cat")]).tensors["embeds"].shape[1] == 24


GUIDED = """
policy:
  class_path: Guided
  init_args:
    scale: 3.0
    negative: blur
    policy:
      class_path: FlowMatchingPolicy.from_pretrained
      init_args: {{path: {path}, resolution: [64, 32], lora: {{rank: 2}}, device: cpu}}
objective: SoftmaxTB
sampler:
  class_path: TreeSampler
  init_args: {{steps: 3, plan: {{class_path: FixedPlan, init_args: {{splits: [0, 1], branches: 2}}}}}}
rewards: rewards.red
prompts: {{class_path: PromptFile, init_args: {{path: prompts.txt}}}}
prompts_per_step: 1
total: 1
"""


def test_a_guided_run_is_exported_too(tmp_path_factory, tmp_path, capsys):
    (tmp_path / "guided.yaml").write_text(GUIDED.format(path=saved(tmp_path_factory, "z-image")))
    assert main(["train", "guided.yaml"]) == 0
    written = load_file("runs/guided/lora/pytorch_lora_weights.safetensors")
    assert main(["export", "runs/guided/step-000001", "--out", "elsewhere", "--role", "policy"]) == 0
    again = load_file("elsewhere/pytorch_lora_weights.safetensors")
    assert written.keys() == again.keys()
    assert all((again[name] == tensor).all() for name, tensor in written.items())
    capsys.readouterr()
    assert main(["export", "runs/guided", "--role", "teacher"]) == 2
    assert "must hold weights of the role 'teacher'; it has policy, reference" in capsys.readouterr().err


def test_export_refuses_what_has_no_trained_weights(tmp_path, capsys):
    assert main(["export", str(EXAMPLES / "sd35_tmpo.yaml")]) == 2
    assert "is a run file, whose weights are not trained yet" in capsys.readouterr().err
