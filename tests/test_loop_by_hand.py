"""The loop that docs/concepts.md writes by hand moves what `AlignmentLoop` moves, bit for bit, with old weights and several updates too."""

import re
from pathlib import Path

import attrs
import pytest
import torch

from diffalign.core import AlignmentLoop, Objective
from diffalign.objectives import DiffusionNFT, SoftmaxTB
from diffalign.policies import GaussianMixturePolicy

PAGE = Path(__file__).parents[1] / "docs" / "concepts.md"
OBJECTIVE = "SoftmaxTB(policy, beta=20.0)"


@attrs.define(eq=False)
class Told(Objective):
    """Objective that writes down which of its hooks are called."""

    inner: Objective
    said: list = attrs.field(factory=list)
    policy: GaussianMixturePolicy = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.policy = self.inner.policy

    def phases(self):
        return self.inner.phases()

    def behavior(self):
        self.said.append("behavior")
        return self.inner.behavior()

    def policies(self):
        return self.inner.policies()

    def after_update(self, role):
        self.said.append(role)

    def after_step(self):
        self.said.append("step")
        self.inner.after_step()


def nft(policy):
    return Told(DiffusionNFT(policy, decay=0.5, updates=2))


def tb(policy):
    return SoftmaxTB(policy, beta=20.0)


def by_hand(make):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert OBJECTIVE in snippet
    names = {"make": make}
    exec(compile(snippet.replace(OBJECTIVE, "make(policy)"), str(PAGE), "exec"), names)
    return names


def by_the_loop(names, make):
    policy = GaussianMixturePolicy(means=[[-1.0, 0.0], [1.0, 0.0]], scale=0.3)
    loop = AlignmentLoop(
        make(policy),
        names["sampler"],
        lambda images, prompts: images.flatten(1).mean(dim=1),
        ["anything"],
        prompts_per_step=1,
        optimizers=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        max_grad_norm=None,
    )
    loop.advance(3)
    return loop.objective


@pytest.mark.parametrize("make", [tb, nft])
def test_it_moves_what_the_loop_moves(make):
    names = by_hand(make)
    mine, theirs = names["objective"].policies(), by_the_loop(names, make).policies()
    assert mine.keys() == theirs.keys()
    for name in mine:
        for one, other in zip(mine[name].parameters(), theirs[name].parameters(), strict=True):
            assert torch.equal(one, other), name


def test_old_weights_roll_out_and_follow():
    objective = by_hand(nft)["objective"]
    assert objective.said == ["behavior", "policy", "policy", "step"] * 3
    start, old = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), objective.inner.old.means
    assert (old - start).abs().max() > 1e-3
    assert not torch.equal(old, objective.policy.means)
