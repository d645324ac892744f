"""What the documents say is run."""

import math
import re
from pathlib import Path

import pytest
import torch
from ring import MODES

from diffalign.core import AlignmentLoop
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, DeterministicSampler
from diffalign.testing import ConstantReward

ROOT = Path(__file__).parents[1]


def snippets(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


def snippet(file: str, holding: str) -> str:
    """The snippet that holds a text."""
    (found,) = [text for text in snippets(file) if holding in text]
    return found


def test_parts_of_the_extension_guide_run_together():
    names: dict = {}
    for text in snippets("docs/extending.md")[:3]:
        exec(compile(text, "docs/extending.md", "exec"), names)
    policy = GaussianMixturePolicy(MODES, 0.3)
    before = policy.means.detach().clone()
    images = torch.zeros(2, 3, 4, 4)
    images[1, ..., 1] = 1.0
    assert names["sharpness"](images, ["a", "b"])[1] > 0
    reward = lambda images, prompts: images.flatten(1).mean(dim=1)  # noqa: E731
    for objective in (names["Reinforce"](policy), names["Reinforce"](policy, rows=2), SoftmaxTB(policy)):
        AlignmentLoop(objective, names["WideFirst"](), reward, Prompts(["a"])).run(1)
    assert not torch.equal(policy.means, before)


def test_the_aggregation_of_the_extension_guide_takes_weights_and_its_hook_watches(capsys):
    names: dict = {}
    for holding in ("class Product", "class CollapseNotice"):
        exec(compile(snippet("docs/extending.md", holding), "docs/extending.md", "exec"), names)
    product, group = names["Product"](weights={"a": 2.0, "b": 1.0}), torch.zeros(3, dtype=torch.long)
    scores = {"a": torch.tensor([1.0, 3.0, -1.0]), "b": torch.tensor([2.0, 0.5, 1.0]), "logged": torch.ones(3)}
    assert product(scores, group).tolist() == [2.0, 4.5, 0.0]
    assert names["Product"]()(scores, group).tolist() == [2.0, 1.5, 0.0]
    policy, rewards = GaussianMixturePolicy(MODES, 0.3), {name: ConstantReward() for name in scores}
    hooks = [names["CollapseNotice"](below=math.inf)]
    AlignmentLoop(SoftmaxTB(policy), ChainSampler(4, 3), rewards, Prompts(["a"]), product, hooks=hooks).run(2)
    assert capsys.readouterr().out.count("step 1: the diversity is ") == 1


def test_the_objective_of_the_extension_guide_refuses_what_it_cannot_replay_and_has_the_property_that_is_shown():
    names: dict = {}
    for holding in ("class Reinforce", "from hypothesis"):
        exec(compile(snippet("docs/extending.md", holding), "docs/extending.md", "exec"), names)
    with pytest.raises(ValueError, match="Reinforce needs stochastic steps"):
        AlignmentLoop(
            names["Reinforce"](GaussianMixturePolicy(MODES, 0.3)), DeterministicSampler(4, samples=3), ConstantReward(), Prompts(["a"])
        )
    names["test_the_level_of_the_rewards_does_not_matter"]()


def test_the_property_of_the_extension_guide_holds_for_its_example_on_noised_ends(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "parts"))
    from reward_weighted import RewardWeighted

    names: dict = {"Reinforce": RewardWeighted}
    exec(compile(snippet("docs/extending.md", "from hypothesis"), "docs/extending.md", "exec"), names)
    names["test_the_level_of_the_rewards_does_not_matter"]()


def test_links_between_documents_lead_somewhere():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def test_the_program_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (whole,) = snippets("README.md")
    short = whole.replace("loop.run(60,", "loop.prompts_per_step = 1; loop.sampler = TreeSampler(2, FixedPlan((0,), 2)); loop.run(1,")
    assert short != whole
    exec(compile(short, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("run", sorted((ROOT / "diffalign").glob("*/runs/*.yaml")), ids=lambda path: path.stem)
def test_built_in_runs_are_the_examples(run):
    assert (ROOT / "examples" / run.name).read_text() == run.read_text()
