"""The share of a device's peak that a step makes use of."""

import json

import pytest
import torch
from test_roofline import build

from diffalign.cli import main
from diffalign.core import AlignmentLoop, Ledger, Policy, Progress
from diffalign.costs.activations import counted_of
from diffalign.costs.utilisation import Utilisation, meter_of
from diffalign.objectives import TrajectoryDistributionMatching
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.runs.console import _of_peak
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward


def test_what_counts_is_what_the_mathematics_needs():
    ledger = Ledger(
        seconds={"rollout": 2.0, "update": 4.0},
        rows={"policy/rollout": 10, "policy/update": 6, "reference/update": 3},
        tracked={"policy/rollout": 0, "policy/update": 4, "reference/update": 0},
    )
    read = Utilisation(forward=5.0, backward=7.0, peak=100.0).read(ledger, {"policy"})
    assert read == {"mfu/rollout": (50.0, 200.0), "mfu/update": (4 * 12.0 + 3 * 5.0, 400.0)}
    assert Utilisation(1.0, 1.0, 1.0).read(Ledger(seconds={"encode": 1.0}), {"policy"}) == {}


@pytest.mark.parametrize("rows", [None, 2])
def test_rows_with_a_gradient_are_told_from_those_that_weigh_pieces(rows):
    loop = build(TinyPolicy(), rows=rows)
    ledger = loop.step(loop.prompts.draw(0, 2), Progress(0, 1)).ledger
    assert ledger.tracked["policy/rollout"] == 0
    assert ledger.tracked["policy/update"] == 8
    assert ledger.tracked["reference/update"] == 0
    assert loop.ledger.tracked == ledger.tracked


def test_a_step_gives_its_share(monkeypatch):
    loop = build(TinyPolicy())
    loop.meter = meter_of(loop, teraflops=1e-6)
    row = counted_of(loop, loop.objective.policy)(1)
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 1))
    useful = report.ledger.rows["policy/rollout"] * row.forward.useful
    assert report.metrics["mfu/rollout"] == pytest.approx(useful / report.ledger.seconds["rollout"] / 1e6)
    useful = 8 * (row.forward.useful + row.backward.useful) + report.ledger.rows["reference/update"] * row.forward.useful
    assert report.metrics["mfu/update"] == pytest.approx(useful / report.ledger.seconds["update"] / 1e6)
    assert _of_peak(report.metrics).startswith("  of peak ")


def test_the_backward_pass_of_a_student_counts_whatever_its_role_is_called():
    student = TDMPolicy(TinyPolicy(), steps=4)
    loop = AlignmentLoop(
        TrajectoryDistributionMatching(student), DeterministicSampler(4, samples=3), channel_reward, Prompts(["a", "b"]), prompts_per_step=2
    )
    assert "policy" not in loop.trained()
    loop.meter = Utilisation(forward=2.0, backward=3.0, peak=1.0)
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 1))
    ledger = report.ledger
    assert ledger.tracked["policy/update"] == ledger.rows["policy/update"] > 0
    trained = ledger.tracked["policy/update"] + ledger.tracked["fake/update"]
    useful = trained * (2.0 + 3.0) + ledger.rows["teacher/update"] * 2.0
    assert report.metrics["mfu/update"] == pytest.approx(useful / ledger.seconds["update"])


def test_the_backward_pass_of_a_kept_graph_counts_where_it_is_done():
    ledger = Ledger(
        seconds={"rollout": 2.0, "update": 4.0},
        rows={"policy/rollout": 10, "reference/update": 4},
        tracked={"policy/rollout": 4, "reference/update": 0},
    )
    meter = Utilisation(forward=5.0, backward=7.0, peak=100.0)
    assert meter.read(ledger, {"policy"}) == {"mfu/rollout": (50.0, 200.0), "mfu/update": (4 * 7.0 + 4 * 5.0, 400.0)}
    del ledger.rows["reference/update"]  # the update may have no row of its own
    assert meter.read(ledger, {"policy"})["mfu/update"] == (4 * 7.0, 400.0)
    assert meter.read(ledger, set())["mfu/rollout"] == (50.0, 200.0)


def test_a_kept_graph_does_the_same_work_as_a_replay_but_its_forward_pass():
    found = []
    for keep in (False, True):
        loop = build(TinyPolicy(), check_rows=0)
        loop.sampler = TreeSampler(4, FixedPlan(splits=(1, 2)), keep_graph=keep)
        ledger = loop.step(loop.prompts.draw(0, 2), Progress(0, 1)).ledger
        found.append({name: useful for name, (useful, _) in Utilisation(2.0, 3.0, 1.0).read(ledger, loop.trained()).items()})
    plain, kept = found
    assert ledger.tracked["policy/rollout"] == 8
    assert kept["mfu/rollout"] == plain["mfu/rollout"]
    assert plain["mfu/update"] - kept["mfu/update"] == 8 * 2.0


def test_nothing_is_counted_on_a_cpu_unless_it_is_asked_for():
    loop = build(TinyPolicy())
    assert meter_of(loop) is None
    assert not any(name.startswith("mfu/") for name in loop.step(loop.prompts.draw(0, 2), Progress(0, 1)).metrics)
    assert not _of_peak({"reward": 1.0})


class Branches(TinyPolicy):
    """Looks at numbers, which a network without memory does not have."""

    def velocity(self, latents, sigma, condition):
        return super().velocity(latents, sigma, condition) * (1.0 if float(latents.sum()) > 0 else 0.5)


def test_a_network_that_cannot_be_counted_is_said_and_runs_on(capsys):
    loop = build(Branches())
    assert meter_of(loop, teraflops=1.0) is None
    assert "mfu: the operations of Branches are not counted: " in capsys.readouterr().err
    assert issubclass(Branches, Policy)


def test_a_run_writes_its_share(tmp_path):
    folder = tmp_path / "run"
    arguments = ["train", "shapeworld_tmpo", "--total", "1", "--prompts_per_step", "1", "--evaluation", "null", "--folder", str(folder)]
    assert main([*arguments, "--teraflops", "0.1"]) == 0
    (step,) = (json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < step["mfu/rollout"] < 10
    assert 0 < step["mfu/update"] < 10
    assert torch.is_grad_enabled()
