"""Parts that live outside the package: checked by import path from the command line and from pytest, and trained with."""

import sys
from pathlib import Path

import pytest
import torch
from started import start

from diffalign import AlignmentLoop
from diffalign.cli import main
from diffalign.core import CPS
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import PropertyError, TinyPolicy, channel_reward, check_objective, check_reward, check_sampler

PARTS = Path(__file__).parents[2] / "examples" / "parts"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(PARTS))


def code_lines(file):
    """Lines that are neither empty nor part of the module's docstring."""
    lines = (PARTS / file).read_text().splitlines()
    return [line for line in lines[1:] if line.strip()]


@pytest.mark.parametrize("file", ["beam.py", "vargrad.py", "redness.py", "reward_weighted.py"])
def test_an_example_part_is_at_most_forty_lines(file):
    assert len(code_lines(file)) <= 40


def test_they_keep_their_contracts():
    from beam import BestOfTree
    from redness import redness
    from reward_weighted import RewardWeighted
    from vargrad import VarGrad

    check_sampler(BestOfTree())
    check_objective(VarGrad)
    check_objective(RewardWeighted)
    check_reward(redness)


def test_an_objective_that_noise_alone_moves_does_not_learn():
    from reward_weighted import RewardWeighted

    with pytest.raises(PropertyError, match=r"does the loss read `batch\.rewards`") as caught:
        check_objective(lambda policy: RewardWeighted(policy, beta=0.0))
    assert [finding.name for finding in caught.value.findings if finding.failure] == ["learns"]


def test_vargrad_has_twice_the_gradient_of_softmax_tb():
    from tiny import assert_same, batch_of, gradient
    from vargrad import VarGrad

    policy = TinyPolicy((2, 2), kernel=CPS("sum"), dtype=torch.float64)  # VarGrad counts in the kernel's unit, which then is nats
    objective, ours = VarGrad(policy, beta=3.0), SoftmaxTB(policy, beta=3.0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.1)
    batch = batch_of(policy)
    assert_same(gradient(objective, batch), 2 * gradient(ours, batch))


def test_they_train():
    from beam import BestOfTree
    from redness import redness
    from vargrad import VarGrad

    policy = TinyPolicy((2, 2))
    loop = AlignmentLoop(
        VarGrad(policy), BestOfTree(), {"red": redness, "channel": channel_reward}, Prompts(["a", "b"]), prompts_per_step=2
    )
    before = [parameter.clone() for parameter in policy.trainable_parameters().values()]
    loop.run(2)
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.trainable_parameters().values(), strict=True))
    AlignmentLoop(SoftmaxTB(policy), TreeSampler(6, FixedPlan((1, 3))), redness, Prompts(["a", "b"]), prompts_per_step=2).run(1)


def test_the_command_line_examines_a_part(capsys):
    assert main(["check-part", "vargrad:VarGrad"]) == 0
    out = capsys.readouterr().out
    assert "vargrad:VarGrad: objective" in out
    assert "ok    learns" in out
    assert main(["check-part", "redness:redness"]) == 0
    assert "no noise" in capsys.readouterr().out


def test_a_faulty_part_fails_with_its_properties(capsys, tmp_path, monkeypatch):
    (tmp_path / "faulty_reward.py").write_text("import torch\ndef noise(images, prompts):\n    return torch.rand(len(images))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check-part", "faulty_reward:noise"]) == 1
    assert "FAIL  repeatable: noise in the score is noise in the gradient" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("no_such_module:Name", "there is no module 'no_such_module'"),
        ("math:pi", "must be a policy, a sampler, an objective or a reward"),
        ("redness", "redness must name a class, function or object; it is a module. Name what is in it: redness:NAME"),
        ("diffalign.testing.broken", "diffalign.testing.broken must name a class, function or object; it is a module."),
        ("diffalign.costs:roofline", "it is a module. Name what is in it: diffalign.costs.roofline:NAME"),
    ],
)
def test_what_is_no_part_is_a_configuration_error(capsys, part, message):
    assert main(["check-part", part]) == 2
    assert message in capsys.readouterr().err


OWN = """
import attrs
from diffalign.core import Loss, Objective, Phase, Policy, Reward, TrajectorySampler
from vargrad import VarGrad

class Forgot(TrajectorySampler):
    def smaple(self, policy, condition, progress, streams): ...

class Unfinished(Objective):
    def __init__(self, policy): self.policy = policy

class Model(VarGrad):
    def __init__(self, model): self.policy = model

@attrs.define(eq=False)
class Needy(VarGrad):
    temperature: float = attrs.field(kw_only=True)

@attrs.frozen
class Judged(Reward):
    judge: str
    def __call__(self, images, prompts): return images.mean(dim=(1, 2, 3))

def needy(policy, beta): return VarGrad(policy, beta)

def nothing(policy): VarGrad(policy)

class Values(VarGrad):
    def phases(self): return (Phase({"policy": self.policy}, self.losses),)
    def losses(self, batch, update):
        for loss in self._losses(batch, update): yield loss.value

def values(policy): return Values(policy)

def boom(policy): raise ValueError("boom")
"""


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("Forgot", "Forgot cannot be built: it must define sample, which its base class leaves open"),
        ("Unfinished", "Unfinished cannot be built: it must define phases, which"),
        ("Model", "the constructor of Model must call its parameter for the aligned weights `policy`, as run files do; it has `model`"),
        ("Needy", "Needy must be built from a policy alone to be checked; temperature has no default. Write a function of `policy`"),
        ("needy", "needy must be built from a policy alone to be checked; beta has no default"),
        ("Judged", "Judged must be built without arguments to be checked; judge has no default. Write a function without arguments"),
        ("nothing", "nothing must give an Objective; it gave NoneType"),
        ("boom", "error: boom"),
        ("values", "values refuses every batch it was offered: "),
        ("values", "TreeSampler: Values.losses, the losses of 'policy', must yield Loss objects, `yield Loss(value)`; it yielded Tensor"),
    ],
)
def test_a_part_that_cannot_be_built_is_a_configuration_error(capsys, tmp_path, monkeypatch, part, message):
    (tmp_path / "unbuilt.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unbuilt", raising=False)
    assert main(["check-part", f"unbuilt:{part}"]) == 2
    assert message in capsys.readouterr().err


def test_what_was_skipped_does_not_count_as_held(capsys):
    assert main(["check-part", "beam:BestOfTree"]) == 0
    assert "10 of 13 properties hold, 3 skipped\n" in capsys.readouterr().out
    assert main(["check-part", "diffalign.samplers:DeterministicSampler"]) == 0
    assert "9 of 13 properties hold, 4 skipped\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unbuilt:Judged", "ERROR: --diffalign unbuilt:Judged: Judged must be built without arguments to be checked; judge has no default"),
        ("unbuilt:Nowhere", "ERROR: --diffalign unbuilt:Nowhere: must be PACKAGE.MODULE:NAME of something that can be imported"),
    ],
)
def test_pytest_says_in_one_line_what_cannot_be_checked(tmp_path, part, message):
    (tmp_path / "unbuilt.py").write_text(OWN)
    command = ["-m", "pytest", "-q", "--diffalign", part, "-p", "no:cacheprovider"]
    done = start(*command, folder=tmp_path, environment={"PYTHONPATH": str(PARTS)})
    assert done.returncode == 4
    assert message in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_pytest_finds_a_part_in_the_folder_in_which_it_starts(tmp_path):
    (tmp_path / "mine.py").write_text("def dark(images, prompts):\n    return 1 - images.mean(dim=(1, 2, 3))\n")
    program = Path(sys.executable).with_name("pytest")  # `python -m pytest` adds the folder itself
    done = start(program, "-q", "--diffalign", "mine:dark", "-p", "no:cacheprovider", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout


def test_pytest_runs_a_contract_one_test_a_property(tmp_path):
    command = ["-m", "pytest", "-q", "--diffalign", "redness:redness", "-p", "no:cacheprovider"]
    done = start(*command, folder=tmp_path, environment={"PYTHONPATH": str(PARTS), "PATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout


def test_a_failure_names_the_line_of_ones_own_code(tmp_path, monkeypatch, capsys):
    (tmp_path / "slipped.py").write_text("def slipped(images, prompts):\n    return images.nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check-part", "slipped:slipped"]) == 1
    assert f"({tmp_path / 'slipped.py'}, line 2)" in capsys.readouterr().out
