"""Python is a first-class way to run: progress, a folder, going on, something to look at, and arguments as people give them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ring import ring_loop

import diffalign
from diffalign.core import AlignmentLoop, CheckpointError, ConfigError, Hook, Interrupted, Partial, Report, TrajectoryBatch
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy
from diffalign.policies.tdm import _unlike
from diffalign.prompts import Prompts
from diffalign.runs import Checkpoints, Console, FirstAndLast, Recorder
from diffalign.samplers import ChainSampler
from diffalign.testing.doubles import TinyPolicy, channel_reward


def tiny(**changed):
    given = {
        "objective": SoftmaxTB(TinyPolicy()),
        "sampler": ChainSampler(4, 3),
        "rewards": channel_reward,
        "prompts": ["one", "two"],
        "prompts_per_step": 2,
    }
    return AlignmentLoop(**{**given, **changed})


def weights(loop):
    return [parameter.detach().clone() for parameter in loop.objective.policy.parameters()]


# --- run


def test_a_run_gives_what_can_be_looked_at() -> None:
    loop = ring_loop()
    result = loop.run(3)
    assert (result.steps, len(result.rewards), len(result.diversity)) == (3, 3, 3)
    assert result.rewards[-1] == loop.reward
    assert result.paths == {}
    assert str(result).startswith("3 steps, ")
    assert f"{result.rewards[0]:.3f} -> {result.rewards[-1]:.3f}" in str(result)


def test_progress_is_shown_where_somebody_looks(capsys, monkeypatch) -> None:
    ring_loop().run(2)
    assert "step 2/2" not in "".join(capsys.readouterr())  # a log that nobody watches
    ring_loop().run(2, show=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 2/2  reward " in shown.err


def test_a_folder_gets_all_that_the_command_writes(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    loop = ring_loop()
    plain = ring_loop()
    plain.advance(3)
    result = loop.run(3, folder=str(folder))
    assert all(torch.equal(mine, other) for mine, other in zip(weights(loop), weights(plain), strict=True))
    assert result.folder == folder
    assert set(result.paths) >= {"metrics", "report", "pictures", "best", "checkpoint"}
    assert all(path.exists() for path in result.paths.values())
    assert result.paths["checkpoint"].name == "step-000003"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    whole = ring_loop()
    whole.advance(5)
    with pytest.raises(ConfigError, match="resume needs the folder"):
        ring_loop().run(5, resume=True)
    ring_loop().run(0, folder=tmp_path, resume=True)  # nothing there yet
    cut = ring_loop(hooks=[StopAfter(2)])
    with pytest.raises(KeyboardInterrupt):
        cut.run(5, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"must not hold another run; it has steps of one\. Give resume=True"):
        ring_loop().run(5, folder=tmp_path)
    loop = ring_loop()
    result = loop.run(5, folder=tmp_path, resume=True)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(loop), weights(whole), strict=True))
    assert (result.steps, len(result.metrics)) == (5, 3)
    assert ring_loop().run(5, folder=tmp_path, resume=True).metrics == ()  # done already


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_start_before_the_last_checkpoint_is_refused_and_the_record_stays(tmp_path: Path) -> None:
    ring_loop().run(3, folder=tmp_path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="must hold no checkpoint after step 1, at which this run starts; it has step-000003"):
        ring_loop().run(5, 1, folder=tmp_path)
    assert files(tmp_path) == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    ring_loop().run(3, folder=tmp_path)
    state = tmp_path / "step-000003" / "state.pt"
    state.unlink()  # else the best one is damaged as well, which shares the file
    state.write_bytes(b"cut off")
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"to resume from; these are damaged: step-000003\. Put their files back, or remove them"):
        ring_loop().run(5, folder=tmp_path, resume=True)
    assert files(tmp_path) == before


class StopAfter(Hook):
    def __init__(self, steps):
        self.steps = steps

    def step(self, loop, report):
        if report.step + 1 == self.steps:
            raise KeyboardInterrupt


def test_hooks_of_a_run_need_no_configuration(tmp_path: Path) -> None:
    hooks = [Recorder(tmp_path), Checkpoints(tmp_path, every=1), FirstAndLast(tmp_path), Console(stderr=True)]
    ring_loop(tmp_path, hooks).advance(1)
    assert not (tmp_path / "config.yaml").exists()
    assert (tmp_path / "step-000001").exists()
    assert (tmp_path / "report.html").exists()


# --- arguments


def test_a_list_of_texts_is_a_source_of_prompts() -> None:
    assert tiny(prompts=["one", "two"]).prompts == Prompts(["one", "two"])
    for wrong in ("prompts.txt", 3, {"one": 1}):
        with pytest.raises(ValueError, match="prompts must be a source of prompts"):
            tiny(prompts=wrong)


@pytest.mark.parametrize(
    ("given", "kind", "rate"),
    [
        (1e-3, torch.optim.AdamW, 1e-3),
        ({"policy": 2e-3}, torch.optim.AdamW, 2e-3),
        (torch.optim.Adam, torch.optim.Adam, 1e-3),
        ({"default": torch.optim.SGD}, torch.optim.SGD, 1e-3),
        (lambda parameters: torch.optim.SGD(parameters, 0.5), torch.optim.SGD, 0.5),
        ({}, torch.optim.AdamW, 1e-4),
    ],
)
def test_optimizers_are_rates_classes_or_functions(given, kind, rate) -> None:
    optimizer = tiny(optimizers=given).running["policy"]
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == rate
    if kind is torch.optim.AdamW:  # a bare rate, and none at all
        assert optimizer.defaults["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizers": "AdamW"}, r"optimizers\['default'\] must be a learning rate, an optimizer class, or a function"),
        ({"objective": TinyPolicy()}, "objective must be an Objective; got TinyPolicy"),
        ({"objective": SoftmaxTB}, "objective must be an Objective; got the class SoftmaxTB itself; call it"),
        ({"sampler": None}, "sampler must be a TrajectorySampler; got NoneType"),
        ({"aggregation": "Raw"}, "aggregation must be an Aggregation; got str"),
        ({"hooks": Console()}, "hooks must be a list of hooks; got Console"),
        ({"rewards": [channel_reward]}, "must be callable with"),
        ({"average": 0.9}, r"average must be an Average, or None for none; got float\. Write Average\(0\.9\)\."),
        ({"average": True}, r"average must be an Average, or None for none; got bool\. Write Average\(0\.9\)\."),
        ({"lr_factor": lambda step: 1.0}, r"lr_factor must be a number or a Scalar, such as Cosine\(1\.0, 0\.05\); got function\. Write a"),
        ({"lr_factor": "high"}, "lr_factor must be a number or a Scalar, such as .*; got str"),
    ],
)
def test_a_wrong_type_is_said_in_our_words(wrong, said) -> None:
    with pytest.raises(ValueError, match=said):
        tiny(**wrong)


def test_types_and_adapters_of_a_policy_as_people_give_them() -> None:
    known = {"path": "shapeworld", "device": "cpu", "max_sequence_length": 16}
    policy = FlowMatchingPolicy.from_pretrained(**known, lora={"rank": 2, "alpha": 2, "targets": ["to_q"]}, dtype=torch.bfloat16)
    assert policy.precision == torch.bfloat16
    assert policy.adapters
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16; got 'fp16'"):
        FlowMatchingPolicy.from_pretrained(**known, dtype="fp16")
    with pytest.raises(ValueError, match="lora must be a LoRA, a dict of its arguments, or None; got int"):
        FlowMatchingPolicy.from_pretrained(**known, lora=16)


# --- smaller


def test_help_explains_the_fields_of_a_forest() -> None:
    text = TrajectoryBatch.__doc__ or ""
    for name in ("condition", "sigmas", "latents", "level", "parent", "prompt", "noise_level", "log_prob", "mean", "call"):
        assert f"        {name}: " in text


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(diffalign.__file__).parents[1])}
    command = [sys.executable, "-m", "diffalign", "parts"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert isinstance(process.stdout, io.BufferedReader)
        process.stdout.close()  # before anything is written
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_layers_on_which_only_one_has_adapters_are_named() -> None:
    def adapted(*layers):
        return [f"network.blocks.0.attn.{layer}.lora_A.default.weight" for layer in layers]

    said = _unlike(adapted("to_q", "to_out.0", "to_k"), adapted("to_q", "to_v"))
    assert said.startswith("The policy has no adapters on to_k, to_out.0; the student has none on to_v: give LoRA.targets")
    assert _unlike(adapted("to_q"), adapted("to_q")) == ""


def test_a_run_without_a_rewarded_step_says_what_it_has(tmp_path: Path) -> None:
    loop = ring_loop()
    loop._rewards = {"nobody": lambda images, prompts: Partial(torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool))}
    outcome = loop.run(2)
    assert outcome.rewards == []
    assert [line.split()[0] for line in str(outcome).splitlines()[1:]] == ["diversity"]


def test_the_end_of_a_run_may_be_asked_for_by_a_hook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Enough(Hook):
        def step(self, loop: AlignmentLoop, report: Report) -> None:
            report.metrics["mine"] = torch.tensor(0.5)
            if report.step == 1:
                loop.end()

    loop = ring_loop(hooks=[Enough()])
    with pytest.raises(Interrupted):
        loop.run(4, folder=tmp_path / "run")
    assert "again: stop now" not in capsys.readouterr().err, "nobody pressed a key"
    loop.end()  # no run is under way
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["mine"]) for line in lines] == [(0, 0.5), (1, 0.5)]
    outcome = ring_loop(hooks=[Enough()]).run(1)
    assert json.loads(json.dumps(outcome.metrics))[0]["mine"] == 0.5
