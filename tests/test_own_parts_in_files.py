"""A user's own functions in a run file: their names, their checks, and what is refused before the run."""

import sys

import pytest

from diffalign import config
from diffalign.cli import main
from diffalign.core import AlignmentLoop, ConfigError, Progress

RUN = """
policy: {class_path: DigitsPolicy.from_pretrained, init_args: {path: digits, device: cpu}}
objective: SoftmaxTB
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {splits: [1], branches: 2}}}
rewards: ClassReward
prompts: {class_path: Prompts, init_args: {prompts: [a digit, a seven]}}
prompts_per_step: 2
total: 8
"""
MINE = '''
from diffalign.core import Hook, Policy
from diffalign.objectives import NormGuard, NormGuarded, SoftmaxTB

def scaled(images, prompts, scale: float = 1.0):
    return scale * images.mean(dim=(1, 2, 3))

def swapped(prompts, images, scale: float = 1.0):
    return images.mean(dim=(1, 2, 3))

def guarded(policy: Policy, guard: NormGuard = NormGuard()) -> NormGuarded:
    return NormGuarded(SoftmaxTB(policy), guard)

class Judge:
    def __init__(self, policy: Policy, width: int = 8): ...

class Judged(SoftmaxTB):
    def __init__(self, policy: Policy, judge: Judge):
        super().__init__(policy)

class Quiet:
    """Not a hook, though it looks like one."""
    def step(self, loop, report): ...
'''
SCALED = "{class_path: own_functions.%s, init_args: {scale: 2}}"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "own_functions.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_functions", raising=False)


def built(*overrides: str) -> AlignmentLoop:
    return config.parse("run.yaml", overrides).build()


def test_a_function_with_arguments_keeps_its_name():
    loop = built("--rewards", SCALED % "scaled", "--aggregation", "{class_path: Raw, init_args: {weights: {scaled: 1.0}}}")
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 8))
    assert "reward/scaled" in report.metrics


def test_a_function_with_arguments_is_checked_as_one_without():
    with pytest.raises(ConfigError, match=r"rewards\['swapped'\] must take \(images, prompts\), in this order; it takes"):
        built("--rewards", SCALED % "swapped")


def test_a_function_that_makes_an_objective_is_a_part():
    loop = built("--objective", "{class_path: own_functions.guarded, init_args: {guard: {weight: 0.5}}}")
    assert type(loop.objective).__name__ == "NormGuarded"
    with pytest.raises(
        ConfigError, match=r"NormGuarded must have a parameter 'policy' .* Name a function of yours .* def mine\(policy: Policy\)"
    ):
        built("--objective", "NormGuarded")


def test_a_part_of_the_objective_is_told_that_it_gets_no_policy():
    inner = "{class_path: own_functions.Judge, init_args: {width: 4}}"
    advice = r"objective\.judge\.policy is missing: Judge needs it \(a Policy\)\. Only the objective itself is given the run's policy"
    with pytest.raises(ConfigError, match=advice):
        built("--objective", f"{{class_path: own_functions.Judged, init_args: {{judge: {inner}}}}}")


def test_a_learning_rate_that_becomes_negative_is_refused_before_the_run(capsys):
    falling = ("--lr_factor", "{class_path: Cosine, init_args: {start: 1.0, end: -1.0}}")
    assert main(["check", "run.yaml", *falling]) == 2
    assert "lr_factor must be finite and at least 0; at step 4 it is -0.222521" in capsys.readouterr().err
    assert built("--lr_factor", "{class_path: Cosine, init_args: {start: 1.0, end: 0.0}}").lr_factor is not None


@pytest.mark.parametrize("weights", ["{first: 1.0}", "{first: 1.0, second: 0.0}"])
def test_a_source_whose_rewards_have_no_weight_is_refused(weights):
    source = "{prompts: {class_path: Prompts, init_args: {prompts: [a %s]}}, rewards: [%s]}"
    changed = (
        *("--rewards", "{first: own_functions.scaled, second: ClassReward}"),
        *(
            "--prompts",
            f"{{class_path: Mixture, init_args: {{sources: {{a: {source % ('digit', 'first')}, b: {source % ('seven', 'second')}}}}}}}",
        ),
    )
    with pytest.raises(ConfigError, match=r"prompts.sources.b: none of its rewards \(second\) has a weight .* or write rewards: \[\]"):
        built(*changed, "--aggregation", f"{{class_path: Raw, init_args: {{weights: {weights}}}}}")
    assert set(built(*changed, "--aggregation", "{class_path: Raw, init_args: {weights: {second: 1.0, first: 2.0}}}").named_rewards()) == {
        "first",
        "second",
    }


def test_hooks_are_looked_at_before_the_run():
    sys.path.insert(0, ".")
    try:
        from own_functions import Quiet
    finally:
        sys.path.remove(".")
    for hook, got in ((Quiet(), "Quiet"), (Quiet, "the class Quiet itself; call it")):
        with pytest.raises(ValueError, match=rf"hooks\[0\] must be a Hook; got {got}"):
            config.parse("run.yaml").build(hooks=[hook])
