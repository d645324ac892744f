# ruff: noqa: E501  a table with one case a line
"""Run files: names, values, overrides, round trips, and every way in which one can be wrong."""

import code
import enum
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import attrs
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse.typing import ClosedUnitInterval, NotEmptyStr
from torch import Tensor

from diffalign import config
from diffalign.config import files, parts
from diffalign.config.resolution import resolve
from diffalign.config.signature import Parameter, alternatives, check, parameters, words
from diffalign.core import (
    AlignmentLoop,
    Average,
    ConfigError,
    Hook,
    Linear,
    Objective,
    Phase,
    Policy,
    Prompt,
    PromptSource,
    Raw,
    Reward,
    TrajectorySampler,
)
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Mixture, PromptFile, Prompts
from diffalign.samplers import ChainSampler, FixedPlan, Plan, TreeSampler

RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1, 0.0], [1, 0.0]], scale: 0.2}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2}}
sampler: {class_path: TreeSampler, init_args: {steps: 6, plan: {class_path: FixedPlan, init_args: {eta: 0.5}}}}
rewards: test_config.first_channel
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
optimizers: {default: {class_path: AdamW, init_args: {lr: 1e-3}}}
"""


def first_channel(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The first channel's mean."""
    return images[:, 0].mean(dim=(1, 2))


def power(exponent: float, scale: float = 1.0) -> Reward:
    """A reward made by a function."""
    return Power(exponent, scale)


def scaled(images: Tensor, prompts: Sequence[Prompt], factor: float = 1.0) -> Tensor:
    return factor * first_channel(images, prompts)


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


PLAN = FixedPlan(splits=(2,), branches=2)


@attrs.frozen
class Power(Reward):
    """A reward with parameters."""

    exponent: float
    scale: float = 1.0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.scale * first_channel(images, prompts) ** self.exponent


class Passes(Reward):
    """A reward whose parameters hide behind **kwargs."""

    def __init__(self, **kwargs: float) -> None:
        self.power = Power(**kwargs)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.power(images, prompts)


class Unresolved(Reward):
    """A reward with an annotation that only a type checker understands."""

    def __init__(self, strange: "NoSuchName" = None, plan: "Plan | None" = None) -> None:  # noqa: F821
        self.plan = plan

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return first_channel(images, prompts)


class Opaque(Reward):
    """A reward that takes anything."""

    def __init__(self, **kwargs: object) -> None:
        self.given = kwargs

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return first_channel(images, prompts)


class Twice(Objective):
    """An objective around another one."""

    def __init__(self, policy: Policy, inner: Objective, weight: float = 1.0) -> None:
        self.policy, self.inner, self.weight = policy, inner, weight

    def phases(self) -> tuple[Phase, ...]:
        return self.inner.phases()


class Student(Objective):
    """An objective that calls the weights otherwise."""

    def __init__(self, student: Policy) -> None:
        self.policy = student

    def phases(self) -> tuple[Phase, ...]:
        return ()


@attrs.frozen
class Nested(TrajectorySampler):
    """A sampler whose default argument is a part with arguments of its own."""

    plan: FixedPlan = attrs.field(factory=lambda: FixedPlan(splits=(0, 1), branches=2))

    def sample(self, *_: object) -> object:
        raise NotImplementedError


class Watcher(Hook):
    built: list[str] = []  # noqa: RUF012  shared on purpose

    def __init__(self, label: str) -> None:
        self.label = label
        self.built.append(label)


def listed(means: Sequence[Sequence[float]], scale: float = 0.1) -> GaussianMixturePolicy:
    """Says when it is called."""
    Watcher.built.append("policy")
    return GaussianMixturePolicy(means, scale)


def parse(*overrides: str, text: str = RUN) -> config.Run:
    return config.parse_text(text, overrides=overrides)


def refusal(*overrides: str, text: str = RUN, build: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:  # noqa: PT012  which of the two it is depends on the case
        run = parse(*overrides, text=text)
        if build:
            run.build()
    return str(caught.value)


# --- what is built


def test_a_run_is_built_from_short_names() -> None:
    loop = parse().build()
    assert isinstance(loop, AlignmentLoop)
    assert isinstance(loop.objective, SoftmaxTB)
    assert isinstance(loop.objective.policy, GaussianMixturePolicy)
    assert loop.objective.beta == 2.0
    assert loop.sampler == TreeSampler(6, FixedPlan(eta=0.5))
    assert loop.rewards is first_channel
    assert isinstance(loop.running["policy"], torch.optim.AdamW)
    assert loop.running["policy"].param_groups[0]["lr"] == 1e-3
    assert loop.folder == Path("runs/run")


def test_resolved_text_gives_the_same_run() -> None:
    run = parse(
        "--average.decay",
        "0.5",
        "--objective.beta",
        "{class_path: Linear, init_args: {start: 1, end: 3, steps: 5}}",
        "--rewards",
        "{a: test_config.first_channel, b: {class_path: test_config.Power, init_args: {exponent: 2}}}",
    )
    text = run.yaml()
    again = config.parse_text(text, run.name)
    assert again.yaml() == text
    assert again.tree.keys() == run.tree.keys()
    assert "init_args: {" not in text
    loop, twin = run.build(), again.build()
    assert loop.sampler == twin.sampler
    assert loop.objective.beta == twin.objective.beta == Linear(1.0, 3.0, 5)
    assert loop.rewards == twin.rewards == {"a": first_channel, "b": Power(2.0)}
    assert "eta: 0.5" in text
    assert "branches: 3" in text, "defaults are written out"
    assert "policy: null" not in text, "what is linked is not"


@pytest.mark.parametrize("name", sorted(config.built_in()))
def test_built_in_runs_are_read(name: str) -> None:
    run = config.parse(name)
    assert config.parse_text(run.yaml(), name).yaml() == run.yaml()
    assert run.folder == Path("runs") / name


def test_quick_parts_are_built_before_the_policy() -> None:
    Watcher.built.clear()
    text = (
        RUN.replace("GaussianMixturePolicy", "test_config.listed") + "hooks: [{class_path: test_config:Watcher, init_args: {label: hook}}]"
    )
    loop = parse(text=text).build(hooks=[Hook()])
    assert Watcher.built[:2] == ["hook", "policy"]
    assert [type(hook).__name__ for hook in loop.hooks] == ["Watcher", "Hook"]
    Watcher.built.clear()
    assert "sampler" in refusal("--sampler.steps", "3", text=text, build=True)
    assert "policy" not in Watcher.built


def test_the_evaluation_comes_first() -> None:
    text = (
        RUN
        + "evaluation: {class_path: test_config.Watcher, init_args: {label: first}}\nhooks: [{class_path: test_config.Watcher, init_args: {label: second}}]"
    )
    loop = parse(text=text).build(hooks=[Watcher("third")])
    assert [hook.label for hook in loop.hooks] == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("test_config.first_channel", first_channel),
        ("test_config:first_channel", first_channel),
        ("{class_path: test_config:first_channel}", first_channel),
        ("{class_path: test_config.Power, init_args: {exponent: 2}}", Power(2.0)),
        ("{class_path: test_config:power, init_args: {exponent: 3, scale: 0.5}}", Power(3.0, 0.5)),
        ("{class_path: test_config.Passes, init_args: {exponent: 2}}", Power(2.0)),
        ("{class_path: Power, init_args: {exponent: 2}}", Power(2.0)),
    ],
)
def test_rewards_of_others(value: str, expected: object) -> None:
    reward = parse("--rewards", value).build().rewards
    assert (reward.power if isinstance(reward, Passes) else reward) == expected


def test_arguments_of_a_function_are_bound() -> None:
    reward = parse("--rewards", "{class_path: test_config.scaled, init_args: {factor: 3}}").build().rewards
    images = torch.rand(2, 3, 1, 1)
    assert torch.equal(reward(images, ["a", "b"]), 3 * first_channel(images, ["a", "b"]))


def test_a_signature_that_says_nothing_takes_anything() -> None:
    reward = parse("--rewards", "{class_path: test_config.Opaque, init_args: {whatever: 3}}").build().rewards
    assert reward.given == {"whatever": 3}


@attrs.frozen
class Typed(Reward):
    """A reward whose parameters have uncommon types."""

    name: NotEmptyStr = "a"  # type: ignore[valid-type]
    mode: Mode = attrs.field(default=Mode.FAST)
    level: Annotated[int, "from 0"] = 0
    share: ClosedUnitInterval = 0.5  # type: ignore[valid-type]
    where: Path = Path("here")
    extra: Any = None
    table: Mapping[int, float] | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return first_channel(images, prompts)


def test_uncommon_types_go_around() -> None:
    given = "{class_path: test_config.Typed, init_args: {mode: SLOW, level: 2, share: 0.25, where: a/b, extra: {a: [1]}, table: {1: 2}}}"
    run = parse("--rewards", given, "--rewards.extra.a.0", "5")
    assert run.build().rewards == Typed(mode=Mode.SLOW, level=2, share=0.25, where=Path("a/b"), extra={"a": [5]}, table={1: 2.0})
    assert config.parse_text(run.yaml()).build().rewards == run.build().rewards
    assert refusal("--rewards", given, "--rewards.share", "3") == "rewards.share must be float restricted to be ≥0 and ≤1; got '3'"
    assert refusal("--rewards", given, "--rewards.level", "x").startswith("rewards.level must be ")
    assert refusal("--rewards", given, "--rewards.mode", "SLWO") == "rewards.mode must be 'FAST' or 'SLOW'; got 'SLWO'"
    assert refusal("--rewards", given, "--rewards.name", "''").startswith("rewards.name must be ")


def test_one_unknown_annotation_does_not_hide_the_others() -> None:
    reward = parse("--rewards", "{class_path: test_config.Unresolved, init_args: {strange: 1, plan: FixedPlan}}").build().rewards
    assert reward.plan == FixedPlan()


def test_an_object_can_be_imported_as_it_stands() -> None:
    run = parse("--sampler.plan", "{class_path: test_config.PLAN}")
    assert run.build().sampler.plan is PLAN
    assert config.parse_text(run.yaml()).build().sampler.plan is PLAN
    assert "takes no init_args" in refusal("--sampler.plan", "{class_path: test_config.PLAN, init_args: {branches: 2}}")


def test_a_wrapper_objective_gets_the_same_policy() -> None:
    text = RUN.replace(
        "{class_path: SoftmaxTB, init_args: {beta: 2}}",
        "{class_path: test_config.Twice, init_args: {inner: {class_path: SoftmaxTB}}}",
    )
    objective = parse(text=text).build().objective
    assert objective.policy is objective.inner.policy


def test_a_mapping_without_class_means_the_default_or_the_only_class() -> None:
    assert parse("--average", "{decay: 0.5}").build().average.decay == 0.5
    nested = "{class_path: test_config.Nested, init_args: {plan: {eta: 0.2}}}"
    assert parse("--sampler", nested).build().sampler.plan == FixedPlan((0, 1), 2, 0.2)
    assert parse("--aggregation.weights", "{first_channel: 2}").build().aggregation == Raw({"first_channel": 2.0})


def test_a_part_that_an_entry_point_announces(monkeypatch: pytest.MonkeyPatch, announce: Callable[..., None]) -> None:
    announce("bright = their_parts:bright\nslow_plan = their_parts:SlowPlan\nbroken = their_parts:nothing\nmissing = no_such_package:thing")
    assert parse("--rewards", "bright").build().rewards.__name__ == "bright"
    run = parse("--sampler.plan", "{class_path: slow_plan, init_args: {at: 2}}")
    assert run.tree["sampler"].arguments["plan"].name == "their_parts.SlowPlan"
    assert run.build().sampler.branching().leaves == 2
    assert "'broken' of their-parts 1.2 cannot be loaded: AttributeError" in refusal("--rewards", "broken")
    assert "Did you mean bright?" in refusal("--rewards", "brigt")
    found = {part.name: part for part in parts.third_party()}
    assert found["missing"].error == "ModuleNotFoundError: No module named 'no_such_package'"
    assert found["bright"].distribution == "their-parts 1.2"


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a distribution `their-parts` 1.2 with these entry points."""

    def install(entries: str) -> None:
        (tmp_path / "their_parts.py").write_text(
            textwrap.dedent('''
            from diffalign.samplers import Branching, Plan

            def bright(images, prompts):
                """How bright it is."""
                return images.mean(dim=(1, 2, 3))

            class SlowPlan(Plan):
                """One split."""
                def __init__(self, at: int) -> None:
                    self.at = at
                def draw(self, steps, progress, streams):
                    return Branching(tuple(2 if i == self.at else 1 for i in range(steps)), tuple(0.5 * (i == self.at) for i in range(steps)))
            ''')
        )
        folder = tmp_path / "their_parts-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text(f"[{parts.GROUP}]\n{entries}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their_parts", raising=False)

    return install


# --- values and overrides


def test_overrides_reach_every_place() -> None:
    run = parse(
        "--sampler.steps", "7", "--sampler.plan.eta=0.9", "--sampler.plan.splits", "[1, 4]", "--sampler.plan.splits.0=2", "--objective.beta", "0.5",
        "--policy.means.0.1", "-3", "--total=2", "--seed", "-1", "--optimizers.policy", "SGD", "--optimizers.policy.lr", "1e-2", "--max_grad_norm=null",
        "--sampler.init_args.rows", "8", "--folder", "2024", "--prompts.prompts", "[yes, 1:30]",
    )  # fmt: skip
    loop = run.build()
    assert loop.sampler == TreeSampler(7, FixedPlan((2, 4), eta=0.9), rows=8)
    assert loop.objective.beta == 0.5
    assert loop.objective.policy.means[0].tolist() == [-1.0, -3.0]
    assert (run.tree["total"], loop.seed, loop.max_grad_norm, loop.folder) == (2, -1, None, Path("2024"))
    assert isinstance(loop.running["policy"], torch.optim.SGD)
    assert loop.prompts.prompts == ("yes", "1:30")


def test_overrides_work_where_the_file_is_silent() -> None:
    text = RUN.replace(", plan: {class_path: FixedPlan, init_args: {eta: 0.5}}", "")
    assert parse("--sampler.plan.eta", "0.25", text=text).build().sampler.plan == FixedPlan(eta=0.25)
    text = RUN.replace(
        "{class_path: TreeSampler, init_args: {steps: 6, plan: {class_path: FixedPlan, init_args: {eta: 0.5}}}}", "TreeSampler"
    )
    assert parse("--sampler.steps", "9", text=text).build().sampler == TreeSampler(9)


def test_an_override_reaches_one_of_two_places_that_share_an_alias() -> None:
    text = RUN.partition("optimizers:")[0] + "optimizers:\n  policy: &same {class_path: AdamW, init_args: {lr: 1}}\n  default: *same"
    run = parse("--optimizers.policy.lr", "2", text=text)
    assert [run.tree["optimizers"][role].arguments["lr"] for role in ("policy", "default")] == [2.0, 1.0]


SEVERAL = RUN.replace(
    "rewards: test_config.first_channel",
    "rewards: {a: test_config.first_channel, b: {class_path: test_config.Power, init_args: {exponent: 2}}}",
)


def test_null_on_the_command_line_drops_an_entry_of_a_mapping() -> None:
    run = parse("--rewards.b=null", text=SEVERAL)
    assert run.build().rewards == {"a": first_channel}
    assert "Power" not in run.yaml()
    assert parse("--rewards.b=null", "--rewards.b=test_config.first_channel", text=SEVERAL).tree["rewards"].keys() == {"a", "b"}
    assert parse("--rewards.c=test_config.first_channel", "--rewards.c=null", text=SEVERAL).tree == parse(text=SEVERAL).tree
    weighted = SEVERAL + "aggregation: {class_path: Raw, init_args: {weights: {a: 1, b: 2}}}\n"
    assert refusal("--rewards.b=null", text=weighted, build=True).startswith(
        "aggregation.weights.b: no reward is called 'b'; the run has a."
    )
    assert parse("--rewards.b=null", "--aggregation.weights.b=null", text=weighted).build().aggregation == Raw({"a": 1.0})


@pytest.mark.parametrize(
    ("overrides", "text", "message"),
    [
        (["--rewards.a=null", "--rewards.b=null"], SEVERAL, "rewards must keep an entry, but null drops the last one, b. Give another one beside it."),
        (["--rewards.bb=null"], SEVERAL, "rewards.bb must be an entry of the run file, a or b, to be dropped by null."),
        ([], SEVERAL.replace("{a: test_config.first_channel,", "{a: ,"), "rewards.a must be a Reward or a function; got None"),
        (["--rewards={a: null, b: test_config.first_channel}"], SEVERAL, "rewards.a must be a Reward or a function; got None"),
        (["--rewards.a=null"], RUN, "rewards.a "),
    ],
)  # fmt: skip
def test_null_drops_only_what_is_there_and_not_the_last(overrides: list[str], text: str, message: str) -> None:
    assert refusal(*overrides, text=text).startswith(message)


def test_a_change_of_class_drops_the_arguments_of_the_other_and_says_so() -> None:
    said = r"^sampler: steps and plan of TreeSampler dropped; ChainSampler is another class and takes its own defaults"
    with pytest.warns(config.ConfigWarning, match=said):
        run = parse("--sampler", "ChainSampler", "--sampler.eta", "0.3")
    assert run.build().sampler == ChainSampler(eta=0.3)
    with pytest.warns(config.ConfigWarning, match="dropped"):
        assert parse("--sampler.class_path", "ChainSampler").build().sampler == ChainSampler()
    with pytest.warns(config.ConfigWarning, match="objective: .*beta.* of SoftmaxTB dropped"):
        assert parse("--objective", "DGPO").tree["objective"].arguments["beta"] == 100.0  # another unit than that of the file
    with pytest.warns(config.ConfigWarning, match="dropped"):  # what was typed stays, before or after
        assert parse("--sampler.steps", "9", "--sampler", "ChainSampler").build().sampler == ChainSampler(9)
    assert parse("--sampler", "TreeSampler").build().sampler == parse().build().sampler
    with pytest.warns(config.ConfigWarning, match="dropped"):
        assert "sampler.plan is no parameter of ChainSampler" in refusal("--sampler", "ChainSampler", "--sampler.plan.eta", "1")


def test_a_class_that_is_usual_at_its_place_need_not_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\n")
    evaluation = {"prompts": "prompts.txt", "samples": 2, "steps": 4}
    named = {
        "prompts": {"class_path": "PromptFile", "init_args": {"path": "prompts.txt"}},
        "optimizers": {"default": {"class_path": "AdamW", "init_args": {"lr": 1e-3}}},
        "evaluation": {"class_path": "HeldOutEvaluation", "init_args": evaluation},
    }
    short = {"prompts": {"path": "prompts.txt"}, "optimizers": {"default": {"lr": 1e-3}}, "evaluation": evaluation}
    texts = [yaml.safe_dump(yaml.safe_load(RUN) | keys) for keys in (named, short)]
    assert parse(text=texts[1]).yaml() == parse(text=texts[0]).yaml()
    optimizer = parse(text=texts[1]).build().running["policy"]
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 1e-3)


@pytest.mark.parametrize(
    ("given", "overrides", "role", "rate"),
    [
        ("1e-3", (), "default", 1e-3),
        ("{default: 1e-3}", (), "default", 1e-3),
        ("{policy: 1}", (), "policy", 1.0),
        ("{policy: 1}", ("--optimizers.policy=2e-3",), "policy", 2e-3),
        ("1e-4", ("--optimizers.default.lr=2e-3",), "default", 2e-3),
        ("{default: {class_path: SGD, init_args: {lr: 1}}}", ("--optimizers=2e-3",), "default", 2e-3),
        ("1e-4", ("--optimizers={policy: 2e-3}",), "policy", 2e-3),
    ],
)
def test_a_bare_learning_rate_is_what_it_is_in_python(given: str, overrides: tuple[str, ...], role: str, rate: float) -> None:
    run = parse(*overrides, text=f"{RUN.partition('optimizers:')[0]}optimizers: {given}")
    assert list(run.tree["optimizers"]) == [role]
    assert parse(text=run.yaml()).yaml() == run.yaml()
    built = run.build()
    python = attrs.evolve(built, optimizers={role: rate}).running["policy"]
    mine = built.running["policy"]
    assert type(mine) is type(python) is torch.optim.AdamW
    assert mine.defaults == python.defaults
    assert (mine.defaults["lr"], mine.defaults["weight_decay"]) == (rate, 1e-4)


def test_a_list_is_a_source_of_prompts_and_a_path_one_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("three\nfour\n")
    rest = "\n".join(line for line in RUN.splitlines() if not line.startswith("prompts:"))
    short = parse(text=f"{rest}\nprompts: [one, two]")
    assert short.yaml() == parse().yaml()
    assert parse("--prompts=[one, three]", "--prompts.1=two").yaml() == short.yaml()
    sources = f"{{list: {{prompts: [one, two], share: 2}}, file: {{prompts: {{path: {tmp_path / 'more.txt'}}}}}}}"
    mixed = parse(text=f"{rest}\nprompts: {{class_path: Mixture, init_args: {{sources: {sources}}}}}")
    made = mixed.build().prompts
    assert isinstance(made, Mixture)
    assert [type(source.prompts) for source in made.sources.values()] == [Prompts, PromptFile]
    assert list(map(str, made.prompts)) == ["one", "two", "three", "four"]
    assert parse(text=mixed.yaml()).yaml() == mixed.yaml()
    assert refusal(text=f"{rest}\nprompts: []", build=True) == "prompts: Prompts.prompts must hold at least one prompt; got none"


NAMED = "{class_path: TreeSampler, init_args: {steps: 6, plan: {class_path: FixedPlan, init_args: {eta: 0.5, splits: [2]}}}}"


@pytest.mark.parametrize(
    ("overrides", "dropped"),
    [
        (["--sampler.plan=ProgressPlan"], "sampler.plan: eta and splits of FixedPlan dropped; ProgressPlan"),
        (["--sampler.plan.class_path=ProgressPlan"], "sampler.plan: eta and splits of FixedPlan dropped; ProgressPlan"),
        (["--sampler.plan=AdaptivePlan", "--sampler.plan=ProgressPlan"], "sampler.plan: eta and splits of FixedPlan dropped; ProgressPlan"),
        (["--sampler.plan=ProgressPlan", "--sampler.plan.branches=4"], "sampler.plan: eta and splits of FixedPlan dropped; ProgressPlan"),
        (["--sampler.plan=ProgressPlan", "--sampler.plan.eta=0.25"], "sampler.plan: splits of FixedPlan dropped; ProgressPlan"),
        (["--optimizers.default=SGD"], "optimizers.default: lr and betas of AdamW dropped; SGD"),
        (["--optimizers.default=SGD", "--optimizers.default.momentum=0.5"], "optimizers.default: lr and betas of AdamW dropped; SGD"),
    ],
)
def test_a_change_of_class_is_the_same_where_the_file_names_none(overrides: list[str], dropped: str) -> None:
    before = "{class_path: TreeSampler, init_args: {steps: 6, plan: {class_path: FixedPlan, init_args: {eta: 0.5}}}}"
    run = RUN.replace("{lr: 1e-3}", "{lr: 1e-3, betas: [0.0, 0.5]}")
    named = run.replace(before, NAMED)
    short = run.replace(before, "{class_path: TreeSampler, init_args: {steps: 6, plan: {eta: 0.5, splits: [2]}}}")
    short = short.replace("{class_path: AdamW, init_args: {lr: 1e-3, betas: [0.0, 0.5]}}", "{lr: 1e-3, betas: [0.0, 0.5]}")
    with pytest.warns(config.ConfigWarning) as said:
        trees = [parse(*overrides, text=text) for text in (named, short)]
    assert trees[0].yaml() == trees[1].yaml()
    assert all(str(warning.message).startswith(f"{dropped} is another class") for warning in said)
    assert len(said) == 2


def test_the_same_class_named_again_keeps_its_arguments_in_every_form() -> None:
    before = "{class_path: TreeSampler, init_args: {steps: 6, plan: {class_path: FixedPlan, init_args: {eta: 0.5}}}}"
    for plan in ("{eta: 0.5, splits: [2]}", "{class_path: FixedPlan, init_args: {eta: 0.5, splits: [2]}}"):
        text = RUN.replace(before, f"{{class_path: TreeSampler, init_args: {{steps: 6, plan: {plan}}}}}")
        run = parse("--sampler.plan=diffalign.samplers.FixedPlan", text=text)
        assert run.build().sampler.plan == FixedPlan(splits=(2,), eta=0.5)


def test_parts_by_name_are_no_arguments_of_the_part_that_replaces_them() -> None:
    text = RUN.replace(
        "rewards: test_config.first_channel", "rewards: {exponent: test_config.first_channel, other: test_config.first_channel}"
    )
    assert parse(text=text).tree["rewards"].keys() == {"exponent", "other"}
    assert "rewards.exponent is missing: Power needs it" in refusal("--rewards=test_config.Power", text=text)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 3, 3.0),
        (float | None, None, None),
        (str | int, "7", "7"),
        (bool, True, True),
        (Path | None, "a/b", Path("a/b")),
        (tuple[int, int], [1, 2], (1, 2)),
    ],
)
def test_plain_values(hint: object, value: object, expected: object) -> None:
    result = check(value, alternatives(hint))
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"), [(int, 3.7), (int, True), (int, None), (int, "x"), (str, 3), (bool, 1), (float, "fast"), (float | None, [])]
)
def test_plain_values_of_another_type_are_refused(hint: object, value: object) -> None:
    with pytest.raises(TypeError):
        check(value, alternatives(hint))


def test_signatures_know_defaults_of_attrs_factories_and_types_behind_converters() -> None:
    known = parameters(TreeSampler)
    assert known["plan"].default == FixedPlan()
    assert parameters(SoftmaxTB).keys() >= {"policy", "beta"}
    assert "_reference_log_prob" not in parameters(SoftmaxTB)
    assert words(parameters(SoftmaxTB)["measure"].hint) == "'relative' or 'path'"
    assert words(Mapping[str, float] | None) == "a mapping (each a number) or null"
    assert words(Average | None) == "an Average or null"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(), scalars | st.lists(scalars | st.lists(scalars)) | st.dictionaries(st.text(), scalars)))
def test_yaml_gives_back_what_was_written(value: dict[str, object]) -> None:
    again = files.read_yaml(files.write_yaml(value), "text")
    assert again == value
    assert repr(again) == repr(value), "kinds too: 1 is not 1.0 and not True"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("010", 10), ("1:30", "1:30"), ("no", "no"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("true", True), ("~", None), (".inf", math.inf), ("1_000", "1_000"), ("e5", "e5")],
)  # fmt: skip
def test_yaml_scalars_hold_no_surprise(text: str, value: object) -> None:
    result = files.read_yaml(text, "text")
    assert result == value
    assert type(result) is type(value)


# --- errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--samplr=3", r"samplr is no key of a run, which has policy, .*\. Did you mean sampler\?"),
        ("--sampler.stepz=3", r"sampler\.stepz is no parameter of TreeSampler, which takes steps, plan, rows and keep_graph\. Did you mean steps\?"),
        ("--sampler.plan.etta=3", r"sampler\.plan\.etta is no parameter of FixedPlan, .* Did you mean eta\?"),
        ("--sampler.steps=3.7", r"sampler\.steps must be an integer; got '3\.7'"),
        ("--sampler.steps=six", r"sampler\.steps must be an integer; got 'six'"),
        ("--sampler.plan.splits=[1, x]", r"sampler\.plan\.splits\.1 must be an integer; got 'x'"),
        ("--objective.measure=relativ", r"objective\.measure must be 'relative' or 'path'; got 'relativ'"),
        ("--objective.beta=fast", r"objective\.beta must be a Scalar, a Budget or a number; got 'fast'\. Known: Constant, Cosine, .*; or an import path .*"),
        ("--sampler=TreSampler", r"sampler must be a TrajectorySampler; got 'TreSampler'\. Did you mean TreeSampler\? Known: ChainSampler, DeterministicSampler, .*"),
        ("--sampler=treesampler", r".*Did you mean TreeSampler\?.*"),
        ("--sampler=CountReward", r"sampler must be a TrajectorySampler; the class 'CountReward' is none\. Known: .*"),
        ("--sampler=test_config.first_channel", r"sampler must be a TrajectorySampler; the function 'test_config.first_channel' is not declared to return one\..*"),
        ("--sampler=diffalign.core.TrajectorySampler", r"sampler must be a TrajectorySampler; the class 'diffalign.core.TrajectorySampler' is abstract: it lacks sample\..*"),
        ("--sampler=test_config.PLAN", r"sampler must be a TrajectorySampler; 'test_config.PLAN' is an object of class FixedPlan\..*"),
        ("--sampler={class_path: 3}", r"sampler must be a TrajectorySampler, named by class_path; got 3"),
        ("--sampler={class_path: TreeSampler, steps: 3}", r"sampler\.steps must stand under init_args: only class_path and init_args are allowed here\."),
        ("--sampler={class_path: TreeSampler, init_arg: {}}", r"sampler\.init_arg must stand under .* Did you mean init_args\?"),
        ("--sampler={class_path: TreeSampler, init_args: [1]}", r"sampler: init_args must be a mapping from parameters to values; got \[1\]"),
        ("--sampler={steps: 3}", r"sampler must name its class: class_path, one of ChainSampler, .* TreeSampler, and its arguments as init_args; got the keys steps"),
        ("--evaluation.every=5", r"evaluation\.prompts is missing: HeldOutEvaluation needs it \(text or a mapping \(each text\)\)\."),
        ("--evaluation={init_args: {every: 5}}", r"evaluation must name its class: class_path, one of .*HeldOutEvaluation.*; got the keys init_args"),
        ("--optimizers={policy: {rate: 1}}", r"optimizers\.policy\.rate is no parameter of AdamW, which takes lr, .*"),
        ("--sampler={class_path: TreeSampler, init_args: {steps: 4}", r"--sampler, line 1: expected ',' or '}', but got '<stream end>'"),
        ("--sampler.class_path={TreeSampler", r"--sampler\.class_path, line 1: expected ',' or '}', but got '<stream end>'"),
        ("--sampler.plan={splits: [1]", r"--sampler\.plan, line 1: expected ',' or '}', but got '<stream end>'"),
        ("--rewards={a: test_config.first_channel, a: x}", r"--rewards, line 1: key 'a' appears a second time \(first in line 1\); keep one"),
        ("--hooks=[Ema", r"--hooks, line 1: expected ',' or '\]', but got '<stream end>'"),
        ("--sampler.plan.splits=[1, 2", r"--sampler\.plan\.splits, line 1: expected ',' or '\]', but got '<stream end>'"),
        ("--optimizers={lr: 2e-4}", r"optimizers\.lr must be a role .*; got the number 0\.0002\. Write optimizers: {default: {lr: 0\.0002}}"),
        ("--optimizers=true", r"optimizers must be a mapping \(each the class of an Optimizer\); got 'true'"),
        ("--prompts=[1, 2]", r"prompts\.prompts\.0 must be a Prompt or text; got 1"),
        ("--sampler=[1]", r"sampler must be a TrajectorySampler; got '\[1\]'"),
        ("--rewards=no_such_module.thing", r"rewards must be a Reward, a function or .*; got 'no_such_module.thing': there is no module 'no_such_module'"),
        ("--rewards=no_such_module:thing", r".*: there is no module 'no_such_module'"),
        ("--rewards=hypothesis.no_such_module.thing", r".*: 'hypothesis' has no 'no_such_module'\..*"),
        ("--rewards=test_config.first_chanel", r".*: 'test_config' has no 'first_chanel'\. Did you mean first_channel\?"),
        ("--policy=FlowMatchingPolicy.from_pretraned", r".*FlowMatchingPolicy has no 'from_pretraned'\. Did you mean from_pretrained\?"),
        ("--rewards={1: CountReward}", r"rewards must have names as keys; got 1\. Put it in quotes\."),
        ("--optimizers.default=Raw", r"optimizers\.default must be the class of an Optimizer; the class 'Raw' is none\..* AdamW, .*"),
        ("--objective.policy=3", r"objective\.policy must be left out: it is the run's own policy\. Remove it\."),
        ("--objective=test_config.Student", r"objective: Student must have a parameter 'policy' for the weights being aligned; it has none\. Name a function of yours .*"),
        ("--objective={class_path: test_config.Twice}", r"objective\.inner is missing: Twice needs it \(an Objective\)\."),
        ("--prompts_per_step=0", r"prompts_per_step must be >= 1; got 0"),
        ("--total=0", r"total must be >= 1; got 0"),
        ("--total=", r"total must be an integer; got ''"),
        ("--hooks=3", r"hooks must be a list \(each a Hook\); got '3'"),
        ("--policy.means.7=3", r"--policy\.means\.7: '7' must be an index into a list of 2, from 0"),
        ("--policy.means.²=3", r"--policy\.means\.²: '²' must be an index into a list of 2, from 0"),
        ("sampler", r"the command line must override by --key value; got 'sampler'"),
        ("--sampler", r"--sampler must be followed by a value; got nothing"),
        ("--sampler..x=3", r"the command line must override by --key value with a dotted key; got '--sampler\.\.x=3'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::diffalign.config.ConfigWarning")
def test_what_cannot_be_read(override: str, message: str) -> None:
    text = refusal(override)
    assert re.fullmatch(message, text, re.DOTALL), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--sampler.steps=1", r"sampler.steps must be >= 2; got 1"),
        ("--sampler.steps=3", r"sampler: FixedPlan.splits must lie in [0, 1] for 3 steps (the last step ends at sigma 0, where no noise is left); got [1, 2, 3]"),
        ("--sampler.plan.branches=1", r"sampler.plan.branches must be >= 2; got 1"),
        ("--objective.beta=-1", r"objective: SoftmaxTB.beta must be positive and finite: it is an inverse temperature; got -1"),
        ("--average.decay=1.5", r"average.decay must be < 1; got 1.5"),
        ("--optimizers.generator=SGD", r"optimizers has an entry 'generator'; the roles are policy, or 'default' for all"),
        ("--optimizers.default.lr=-1", r"optimizers.default: Invalid learning rate: -1.0"),
        ("--aggregation.weights={first_chanel: 1}", r"aggregation.weights.first_chanel: no reward is called 'first_chanel'; the run has first_channel. Did you mean first_channel?"),
    ],
)  # fmt: skip
def test_what_constructors_refuse(override: str, message: str) -> None:
    assert refusal(override, build=True) == message


def test_modules_that_fail_when_they_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "they_raise.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "they_need.py").write_text("import what_is_not_installed")
    assert refusal("--rewards", "they_raise.thing").endswith(
        f": module 'they_raise' cannot be imported: RuntimeError: no licence ({tmp_path / 'they_raise.py'}, line 1)"
    )
    assert refusal("--rewards", "they_need:thing").endswith(
        f": module 'they_need' cannot be imported: No module named 'what_is_not_installed' ({tmp_path / 'they_need.py'}, line 1)"
    )


OWN = """import attrs

from diffalign.core import ConfigError, Reward


class Keyed(Reward):
    def __init__(self, key="key"):
        self.key = {}[key]

    def __call__(self, images, prompts): ...


class Parsed(Keyed):
    def __init__(self, number="seven"):
        self.number = int(number)


class Refusing(Keyed):
    def __init__(self):
        raise ConfigError("Refusing.number must be 7; got 8")


@attrs.frozen
class Checked(Keyed):
    number: int = attrs.field(default=0, validator=attrs.validators.ge(1))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Keyed", "rewards: own_errors.Keyed raised KeyError: 'key' ({file}, line 8; --debug shows the traceback)"),
        (
            "Parsed",
            "rewards: own_errors.Parsed: invalid literal for int() with base 10: 'seven' ({file}, line 15; --debug shows the traceback)",
        ),
        ("Refusing", "rewards: Refusing.number must be 7; got 8"),
        ("Checked", "rewards.number must be >= 1; got 0"),
    ],
)
def test_an_error_in_ones_own_constructor_has_its_class_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_errors", raising=False)
    (tmp_path / "own_errors.py").write_text(OWN)
    assert refusal(f"--rewards=own_errors.{name}", build=True) == message.format(file=tmp_path / "own_errors.py")


def test_a_module_that_hides_ones_own_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_empty.py").write_text("")
    assert refusal("--rewards=code.LowInk").endswith(
        f": 'code' has no 'LowInk'. It is Python's own module, {code.__file__}: give your file another name."
    )
    assert refusal("--rewards=own_empty.LowInk").endswith(f": 'own_empty' has no 'LowInk'. The module is {tmp_path / 'own_empty.py'}.")


def test_text_on_the_command_line_need_not_be_yaml() -> None:
    assert parse("--prompts.prompts.0", "a: b: {").build().prompts.prompts == ("a: b: {", "two")
    assert parse("--prompts.prompts.1", "7").build().prompts.prompts == ("one", "7")
    assert parse("--prompts.prompts.1", "{a brace").build().prompts.prompts == ("one", "{a brace")


def test_a_missing_prompt_file_is_named_with_its_place() -> None:
    text = RUN.replace(
        "{class_path: Prompts, init_args: {prompts: [one, two]}}", "{class_path: PromptFile, init_args: {path: no/such/list.txt}}"
    )
    assert refusal(text=text, build=True).startswith("prompts.path must be a readable UTF-8 file; got 'no/such/list.txt'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "run, line 5: key 'c' appears a second time (first in line 3); keep one"),
        ("policy: {a: [1, 2\nb: 3", "run, line 2: "),
        ("policy: !!python/object:os.system x", "run, line 1: could not determine a constructor"),
        ("[1]: 2", "run, line 1: a key must be a plain word"),
        ("- 1", "run must hold keys (policy: ..., objective: ..., ...); got list"),
        ("{}", "policy is missing: a run needs it (a Policy)."),
        (RUN.replace("scale: 0.2", "shift: 1"), "policy.scale is missing: GaussianMixturePolicy needs it (a number)."),
        (RUN.replace("beta: 2", "beta: ").replace("scale: 0.2", "scale: ~"), "policy.scale must be a number; got None"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(text: str, message: str) -> None:
    assert refusal(text=text).startswith(message)


def test_merge_keys_and_aliases_are_no_duplicates() -> None:
    assert files.read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "text") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.locate("shapeworld_tmpo") == config.built_in()["shapeworld_tmpo"]
    (tmp_path / "shapeworld_tmpo").write_text(RUN)
    assert config.locate("shapeworld_tmpo") == Path("shapeworld_tmpo")
    assert config.parse("shapeworld_tmpo").build().rewards is first_channel


def test_runs_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"RUN 'shapeworld_tmp': there is no file and no built-in run of that name\. Did you mean shapeworld_tmpo\?"
    ):
        config.parse("shapeworld_tmp")
    with pytest.raises(ConfigError, match=r"there is no such file\. Built in: .*shapeworld_tmpo"):
        config.parse(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"must be a run file or a run folder; this folder has no config\.yaml"):
        config.parse(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml must be a readable UTF-8 file"):
        config.parse(tmp_path / "run.yaml")


def test_a_run_folder_gives_its_own_run_wherever_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "config.yaml").write_text(parse("--folder", "runs/elsewhere").yaml())
    run = config.parse(folder)
    assert (run.name, run.folder) == ("moved", folder)
    assert config.parse(folder, ["--folder", "new"]).folder == Path("new")


def test_every_own_part_can_be_described() -> None:
    own = parts.own()
    assert {
        "TreeSampler",
        "SoftmaxTB",
        "PromptFile",
        "FixedPlan",
        "CPS",
        "LoRA",
        "CountReward",
        "FlowMatchingPolicy.from_pretrained",
    } <= own.keys()
    for part in own.values():
        assert not part.error
        if any(
            isinstance(part.target, type) and issubclass(part.target, slot)
            for slot in parts.SLOTS.values()
            if isinstance(slot, type) and slot is not parts.SLOTS["PromptSource"]
        ):
            assert part.summary, part.name
            assert parameters(part.target) is not None, part.name
    assert isinstance(Linear(0, 1, 2), parts.SLOTS["Scalar"])


@pytest.mark.parametrize(("hint", "value"), [(PromptSource | Mapping[str, str], {"a": "b"}), (PromptSource | dict[str, float], {"a": 1.0})])
def test_a_mapping_that_a_parameter_takes_itself_is_no_short_form(hint, value):
    assert resolve(value, Parameter("x", hint), "x") == value
