"""The run files of the model families: their settings on tiny random pipelines, trained for two steps and exported."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_pipelines import saved

from diffalign import config
from diffalign.cli import main
from diffalign.core import Cosine, Linear, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import read_prompts
from diffalign.rewards.geneval_rules import wanted
from diffalign.rewards.ocr import wanted_text
from diffalign.vocabulary import NAMES

EXAMPLES = Path(__file__).parents[1] / "examples"
TREES = {"flux1_tmpo_pickscore": "flux-dev", "flux1_tmpo_geneval": "flux-dev", "flux1_tmpo_ocr": "flux-dev", "sd35_tmpo": "sd3"}
FEW_STEPS = {"sd35_tdm_r1_geneval": "sd3", "sd35_tdm_r1_ocr": "sd3", "sd35_tdm_r1_hpsv2": "sd3", "zimage_tdm_r1": "z-image"}
RUNS = TREES | FEW_STEPS
LIKE = {
    "flux1_tmpo_pickscore": "flux1_tmpo_geneval",
    "flux1_tmpo_ocr": "flux1_tmpo_geneval",
    "sd35_tdm_r1_geneval": "sd35_tdm_r1_hpsv2",
    "sd35_tdm_r1_ocr": "sd35_tdm_r1_hpsv2",
}
"""Runs that are not trained here -> one that is, and has the same parts with other numbers."""
NUMBERS = {"beta", "epsilon", "lr", "max_grad_norm", "reference_weight", "reward_floor", "reward_guidance", "reward_stages", "steps"}
NUMBERS |= {"surrogate_floor", "prompts_per_step", "total"}
RELEASED = [f"attn.{layer}" for layer in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")]
"""Layers of the published student of Stable Diffusion 3.5, in its trainer's order."""


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


def written(run):
    return yaml.safe_load((EXAMPLES / f"{run}.yaml").read_text())


def overrides(run, folder):
    """What takes a run's weights and rewards to something tiny; its settings and its prompts stay."""
    rewards = [f"--rewards.{name}={part}" for name, part in zip(written(run)["rewards"], ("rewards.red", "rewards.blue"), strict=False)]
    tiny = {"path": folder, "resolution": 32, "max_sequence_length": 24, "dtype": "float32", "device": "cpu"}
    if "start" in base_of(run)["lora"]:
        tiny["lora.start"] = student(folder)
    policy = [f"--policy.{'policy.' * (run in FEW_STEPS)}{name}={value}" for name, value in tiny.items()]
    return [*policy, *rewards, "--evaluation", "null", "--prompts_per_step", "1"]


def base_of(run):
    policy = written(run)["policy"]["init_args"]
    return policy["policy"]["init_args"] if run in FEW_STEPS else policy


def student(folder, out="student"):
    """A list of tensors as the authors publish students, given its names back by the example program."""
    lora = LoRA(rank=32, alpha=64, targets=RELEASED)
    tensors = [torch.randn_like(tensor) / 50 for tensor in FlowMatchingPolicy.from_pretrained(folder, lora=lora).own_parameters().values()]
    torch.save({"ema_parameters": tensors}, "student.ckpt")
    program = runpy.run_path(str(EXAMPLES / "student_from_list.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["student_from_list.py", folder, "student.ckpt", out])
        program["main"]()
    return out


@pytest.mark.parametrize("run", TREES)
def test_a_run_passes_check_with_the_papers_settings(run, tmp_path_factory, capsys):
    assert main(["check", str(EXAMPLES / f"{run}.yaml"), *overrides(run, saved(tmp_path_factory, RUNS[run]))]) == 0
    printed = capsys.readouterr().out
    assert "27" in next(line for line in printed.splitlines() if line.startswith("leaves per prompt"))
    assert "lora" in printed


@pytest.mark.parametrize("run", FEW_STEPS)
def test_a_few_step_run_passes_check_with_the_papers_settings(run, tmp_path_factory, capsys):
    assert main(["check", str(EXAMPLES / f"{run}.yaml"), *overrides(run, saved(tmp_path_factory, RUNS[run]))]) == 0
    printed = capsys.readouterr().out
    assert "24" in next(line for line in printed.splitlines() if line.startswith("leaves per prompt"))
    assert "surrogate" in printed


def flat(tree, path=""):
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    return (
        {name: value for key, inner in tree.items() for name, value in flat(inner, f"{path}.{key}").items()}
        if isinstance(tree, dict)
        else {path: tree}
    )


@pytest.mark.parametrize(("run", "trained"), LIKE.items())
def test_a_run_that_is_not_trained_here_has_the_parts_of_one_that_is(run, trained):
    mine, its = flat(written(run)), flat(written(trained))
    changed = {name for name in mine.keys() | its.keys() if mine.get(name) != its.get(name)}
    parts = {name for name in changed if not name.startswith((".rewards.", ".prompts.", ".evaluation.prompts"))}
    assert {name.rpartition(".")[2] for name in parts} <= NUMBERS, "train it too"


@pytest.mark.parametrize("run", [run for run in RUNS if run not in LIKE])
def test_a_run_trains_and_its_weights_are_exported(run, tmp_path_factory, tmp_path, capsys):
    folder = tmp_path / "run"
    tiny = overrides(run, saved(tmp_path_factory, RUNS[run]))
    assert main(["train", str(EXAMPLES / f"{run}.yaml"), *tiny, "--total", "2", "--average.every=1", "--folder", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    if run in FEW_STEPS:  # deterministic steps alone
        assert not any("contract/deviation" in line for line in lines)
    else:
        assert all(line["contract/deviation"] < 1e-4 for line in lines)
    trained = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    assert ("SurrogateReward" if run in FEW_STEPS else "SoftmaxTB") in (folder / "lora" / "README.md").read_text()
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
    assert all((again[name] == tensor).all() for name, tensor in trained.items())  # lora/ is the same thing, at the end of every run


@pytest.mark.parametrize("run", [*RUNS, "flux1_tmpo_24gb"])
def test_a_run_needs_no_file_of_prompts_and_its_rewards_understand_those_that_it_has(run):
    tree = written(run)
    paths = tree["prompts"]["path"], tree["evaluation"]["prompts"]  # the usual classes are left out
    assert paths[1] == f"{paths[0]}-held-out"
    for path in paths:
        prompts = read_prompts(path)
        assert len(prompts) > 100
        if "geneval" in tree["rewards"]:
            assert all(wanted(prompt, NAMES) for prompt in prompts)
        if "ocr" in tree["rewards"]:
            assert all(wanted_text(prompt) for prompt in prompts)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_says_what_the_paper_reports_and_what_it_needs(run):
    text = (EXAMPLES / f"{run}.yaml").read_text()
    header = text[: text.index("\npolicy:")]
    for word in ("arXiv:2603.07700" if run in FEW_STEPS else "arXiv:2605.10983", "eport", "Needs:", "Hardware:", "train examples/" + run):
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
    assert loop.lr_factor == Cosine(1.0, 0.1)
    assert policy.encode([Prompt("a cat")]).tensors["embeds"].shape[1] == 24


@pytest.mark.parametrize("run", FEW_STEPS)
def test_a_student_starts_where_its_file_says_and_its_teacher_at_the_base(run, tmp_path_factory):
    loop = config.parse(EXAMPLES / f"{run}.yaml", overrides(run, saved(tmp_path_factory, RUNS[run]))).build()
    roles = loop.objective.policies()
    changed = {
        role: any(bool(tensor.any()) for name, tensor in policy.own_parameters().items() if "lora_B" in name)
        for role, policy in roles.items()
    }
    has_start = "start" in base_of(run)["lora"]
    assert changed == {"generator": has_start, "fake": False, "surrogate": False, "old_surrogate": False, "teacher": False}
    assert roles["generator"].sigmas(4).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert {role: optimizer.defaults["lr"] for role, optimizer in loop.running.items()} == {
        "surrogate": 3e-4,
        "fake": 3e-4,
        "generator": 7.5e-5,
    }
    assert loop.running["generator"].defaults["betas"] == loop.running["fake"].defaults["betas"] == (0.0, 0.999)
    if has_start:
        given = torch.load("student.ckpt", weights_only=True)["ema_parameters"]
        mine = roles["generator"].own_parameters().values()
        assert all(torch.equal(tensor, start) for tensor, start in zip(mine, given, strict=True))


def test_a_list_of_another_length_gets_no_names(tmp_path_factory, monkeypatch):
    torch.save({"ema_parameters": [torch.zeros(2, 2)]}, "student.ckpt")
    monkeypatch.setattr("sys.argv", ["student_from_list.py", saved(tmp_path_factory, "sd3"), "student.ckpt", "student"])
    with pytest.raises(SystemExit, match=r"must hold the \d+ tensors of adapters of rank 32, in the order of the layers; it has 1"):
        runpy.run_path(str(EXAMPLES / "student_from_list.py"))["main"]()


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
    trained = load_file("runs/guided/lora/pytorch_lora_weights.safetensors")
    assert main(["export", "runs/guided/step-000001", "--out", "elsewhere", "--role", "policy"]) == 0
    capsys.readouterr()
    assert main(["export", "runs/guided", "--out", "elsewhere", "--format", "comfyui"]) == 2  # beside it both would have one README
    assert "--out must be a new or an empty folder; elsewhere holds files" in capsys.readouterr().err
    again = load_file("elsewhere/pytorch_lora_weights.safetensors")
    assert trained.keys() == again.keys()
    assert all((again[name] == tensor).all() for name, tensor in trained.items())
    capsys.readouterr()
    assert main(["export", "runs/guided", "--role", "teacher"]) == 2
    assert "must hold weights of the role 'teacher'; it has policy, reference" in capsys.readouterr().err


def test_export_refuses_what_has_no_trained_weights(tmp_path, capsys):
    assert main(["export", str(EXAMPLES / "sd35_tmpo.yaml")]) == 2
    assert "is a run file, whose weights are not trained yet" in capsys.readouterr().err
