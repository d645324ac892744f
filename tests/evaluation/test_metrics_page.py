"""The page of definitions names everything that a run writes."""

import inspect
import json
import re
from pathlib import Path

from half_base import HalfBase
from ring import ring_loop

from diffalign import AlignmentLoop
from diffalign.core import Overlapped, Progress, Prompt
from diffalign.evaluation import evaluate, features
from diffalign.evaluation.alarm import HackingAlarm
from diffalign.evaluation.features import Features
from diffalign.objectives import FlowGRPO
from diffalign.runs.recording import Recorder
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing.doubles import TinyPolicy, channel_reward

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def general(name):
    """As the page writes it: reward/NAME, rows/ROLE/STAGE."""
    name = re.sub(r"^(rows|calls)/[^/]+/[^/]+$", r"\1/ROLE/STAGE", name)
    name = re.sub(r"^(seconds|hidden)/.*", r"\1/STAGE", name)
    name = re.sub(r"^grad_norm/.*", "grad_norm/ROLE", name)
    return re.sub(r"^reward/(?!group_std).*", "reward/NAME", name)


def test_every_metric_of_a_run_is_defined(tmp_path):
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")], rollout=Overlapped()).run(1)
    assert "hidden/reward" in json.loads((tmp_path / "metrics.jsonl").read_text())
    names = {general(name) for name in json.loads((tmp_path / "metrics.jsonl").read_text())} - {"step"}
    names -= {"beta", "advantage/std"}  # a setting, and what the objective's docstring says
    missing = sorted(name for name in names if f"`{name}`" not in PAGE)
    assert not missing


def test_the_scale_of_losses_above_a_base_in_float16_is_defined():
    policy = HalfBase()
    loop = AlignmentLoop(FlowGRPO(policy), TreeSampler(3, FixedPlan((1,))), channel_reward, ["left"], prompts_per_step=1)
    metrics = loop.step([Prompt("left")], Progress(0, 1)).metrics
    found = {name.replace("/policy", "/ROLE") for name in metrics if "scale" in name}
    assert found == {"loss_scale/ROLE"}
    assert all(f"`{name}`" in PAGE for name in found)


def test_every_measure_of_an_evaluation_is_defined():
    result = evaluate(TinyPolicy(), [Prompt("a")], {"near": channel_reward}, samples=2, steps=2)
    for name in (*result.diversity, *result.across):
        assert f"`{name.replace('pixels', 'NAME')}`" in PAGE, name
    concrete = [
        kind for kind in vars(features).values() if inspect.isclass(kind) and issubclass(kind, Features) and not inspect.isabstract(kind)
    ]
    assert len(concrete) == 4
    for kind in concrete:
        assert f"`{kind.__name__}`" in PAGE


def test_numbers_of_the_alarm_are_those_of_the_page():
    alarm = HackingAlarm()
    numbers = f"moved by +{alarm.rise:g} or more, a held-out reward by -{alarm.threshold:g} or less and by {alarm.fall:g} of"
    text = " ".join(PAGE.split())
    assert numbers in text
    assert f"by {alarm.diversity_fall:g} nats" in text
