"""`diffalign export --role`: the weights of each role of a run, and what their card says of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import TOY

from diffalign import config
from diffalign.cli import main
from diffalign.core import ConfigError
from diffalign.digits import DigitsPolicy
from diffalign.export.formats import usual_form
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.runs.snapshot import RunSnapshot, read_manifest, write
from diffalign.runs.trained import evaluated_role, trained_policy

AVERAGED = """
policy: {class_path: DigitsPolicy.from_pretrained, init_args: {device: cpu, trainable: true}}
objective: SoftmaxTB
sampler: {class_path: ChainSampler, init_args: {steps: 3, samples: 2}}
rewards: ClassReward
prompts: [a seven, a two]
prompts_per_step: 1
average: {decay: 0.5}
evaluation: {prompts: held-out.txt, steps: 2, samples: 2}
total: 2
"""
STUDENT = """
policy:
  class_path: TDMPolicy
  init_args: {steps: 2, policy: {class_path: DigitsPolicy.from_pretrained, init_args: {device: cpu, trainable: true}}}
objective:
  class_path: TrajectoryDistributionMatching
  init_args: {teacher: {class_path: DigitsPolicy.from_pretrained, init_args: {device: cpu, trainable: false}}}
sampler: {class_path: DeterministicSampler, init_args: {steps: 2, samples: 2}}
rewards: ClassReward
prompts: [a seven, a two]
prompts_per_step: 1
total: 1
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps and of one, in their folder."""
    folder = tmp_path_factory.mktemp("roles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "held-out.txt").write_text("a one\na three\n")
        (folder / "averaged.yaml").write_text(AVERAGED)
        (folder / "student.yaml").write_text(STUDENT)
        for name in ("averaged", "student"):
            assert main(["train", f"{name}.yaml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@pytest.mark.parametrize(
    ("given", "role", "measured"),
    [
        ([], "average", True),
        (["--role", "average"], "average", True),
        (["--role", "policy"], "policy", False),
        (["--role", "reference"], "reference", False),
    ],
)
def test_a_card_names_the_role_and_has_the_measurements_of_what_was_measured(
    given: list[str], role: str, measured: bool, tmp_path: Path
) -> None:
    assert main(["export", "runs/averaged", "--format", "merged", "--out", str(tmp_path / "out"), *given]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| role in the run | {role} |" in card
    assert ("## Measured (held-out evaluation at step 2" in card) == measured
    assert ("Nothing was measured on these weights." in card) != measured


@pytest.mark.parametrize("role", ["fake", "teacher", "generator"])
def test_every_role_of_a_few_step_run_is_exported(role: str, tmp_path: Path) -> None:
    assert main(["export", "runs/student", "--format", "merged", "--out", str(tmp_path / "out"), "--role", role]) == 0
    written, kept = load_file(tmp_path / "out" / "velocity.safetensors"), load_file(f"runs/student/step-000001/{role}.safetensors")
    around = "policy.network." if role == "generator" else "network."  # the student is a policy around another
    assert {f"{around}{name}" for name in written} == kept.keys()
    assert all(torch.equal(tensor, kept[f"{around}{name}"]) for name, tensor in written.items())


def test_the_policy_of_a_role_has_the_student_around_it_only_where_the_run_has(trained: Path) -> None:
    job, checkpoint = config.parse("runs/student"), trained / "runs/student/step-000001"
    assert evaluated_role(read_manifest(checkpoint)) == "generator"
    assert isinstance(trained_policy(job, checkpoint), TDMPolicy)
    assert isinstance(trained_policy(job, checkpoint, "fake"), DigitsPolicy)


def test_weights_of_another_network_are_refused_with_the_roles_that_can_be_had(tmp_path: Path) -> None:
    job, checkpoint = config.parse("runs/student"), tmp_path / "step-000001"
    weights = {"policy": job.build().objective.policy.own_parameters(), "judge": {"weight": torch.zeros(1)}}
    write(
        RunSnapshot({role: {name: tensor.detach() for name, tensor in own.items()} for role, own in weights.items()}, {}, {}),
        checkpoint,
        {"step": 1},
        "",
    )
    trained_policy(job, checkpoint)
    with pytest.raises(
        ConfigError, match=r"the role 'judge' must have the weights of the run's policy, .* Give --role with one of policy\."
    ):
        trained_policy(job, checkpoint, "judge")


@pytest.mark.parametrize(("given", "where"), [([], "runs/toy"), (["--format", "merged"], "--format merged")])
def test_a_format_that_nobody_gave_is_not_blamed(given, where, tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text(TOY)
    if not Path("runs/toy").exists():
        assert main(["train", str(tmp_path / "toy.yaml"), "--total", "1"]) == 0
    capsys.readouterr()
    assert main(["export", "runs/toy", *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {where}: only a policy over a diffusers pipeline, or one with a method save(folder)")


@pytest.mark.parametrize(("lora", "form"), [(LoRA(rank=2), "diffusers"), (None, "merged")])
def test_the_usual_format_is_the_adapters_where_there_are_some(lora, form):
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=lora, device="cpu")
    assert usual_form(policy) == usual_form(TDMPolicy(policy, 4)) == form
