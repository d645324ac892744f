"""Two properties of objectives: what no phase trains stays apart from the trained weights, and a resumed run goes on as before."""

import copy

import attrs
import pytest
import torch

from diffalign.core import Edges, Guided, Loss, Objective, Phase, Policy, group_normalize, replay_log_prob
from diffalign.testing import PropertyError, TinyPolicy
from diffalign.testing.held_policies import held, require_apart
from diffalign.testing.objective_contract import OBJECTIVE
from diffalign.testing.objective_subject import subject_of
from diffalign.testing.properties import NotApplicableError, examine, require
from diffalign.testing.resumption import require_resumption


@attrs.define(eq=False)
class Holding(Objective):
    """Policy gradient with a pull to `old`, which follows after each step, and a baseline; each may be forgotten in a checkpoint."""

    policy: Policy
    listed: bool = True
    counted: bool = True
    old: Policy = attrs.field(init=False)
    baseline: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self):
        self.old = self.policy.fork()

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses),)

    def policies(self):
        return {"policy": self.policy, **({"old": self.old} if self.listed else {})}

    def state(self):
        return {"baseline": self.baseline} if self.counted else {}

    def restore(self, state):
        self.baseline = state["baseline"]

    def _losses(self, batch, update):
        forest, edges = batch.trajectories, Edges.of(batch.trajectories)
        advantage = forest.node_mean(group_normalize(batch.rewards, forest.group).double())[edges.child]
        log_prob = replay_log_prob(self.policy, forest, edges)
        with torch.no_grad():
            old = replay_log_prob(self.old, forest, edges)
        gap = (log_prob - old).square() * (1 + self.baseline)
        yield Loss((gap - advantage * log_prob).sum() / batch.groups)

    def after_step(self):
        self.old.lerp_(self.policy, 0.1)
        self.baseline += 1


def test_an_objective_whose_checkpoint_holds_everything_keeps_the_contract():
    findings = require("Holding", examine(subject_of(Holding), OBJECTIVE))
    assert {"resumes", "frozen reference"} <= {finding.name for finding in findings if not finding.skipped}


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        (
            "listed",
            r"2 steps after a resume, .* differs by .* \.old has moved since it was built, and policies\(\) does not name",
        ),
        ("counted", r"or in state\(\) and restore\(\) \(these differ: baseline\)"),
    ],
)
def test_what_a_checkpoint_loses_is_found_and_named(forgotten, message):
    with pytest.raises(AssertionError, match=message):
        require_resumption(subject_of(lambda policy: Holding(policy, **{forgotten: False})))


def test_a_state_that_cannot_be_read_from_a_file_is_found():
    kind = type("Opaque", (Holding,), {"state": lambda self: {"baseline": Edges}})
    with pytest.raises(AssertionError, match=r"state\(\) must hold numbers, texts and tensors alone"):
        require_resumption(subject_of(lambda policy: kind(policy)))


def loose(policy):
    return policy.fork(trainable=True)


def borrowed(policy):
    """A fork with tensors of its own, but of the same memory."""
    twin = policy.fork()
    for name, parameter in dict(twin.network.named_parameters()).items():
        room, _, last = name.rpartition(".")
        owner = twin.network.get_submodule(room)
        setattr(owner, last, torch.nn.Parameter(dict(policy.network.named_parameters())[name].data, requires_grad=False))
        assert parameter.shape == getattr(owner, last).shape
    return twin


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda policy: policy, r"\.old holds the weights that the role 'policy' trains, so it moves with every update"),
        (copy.copy, r"\.old holds the weights that the role 'policy' trains"),
        (lambda policy: Guided(policy, 2.0), r"\.old holds the weights that the role 'policy' trains"),
        (loose, r"\.old has 2 parameters that require gradients, though no phase trains them"),
        (borrowed, r"\.old gives other velocities once the trained weights have moved"),
    ],
)
def test_a_policy_that_is_not_apart_is_found_wherever_the_constructor_makes_it(made, message):
    @attrs.define(eq=False)
    class Own(Holding):
        def __attrs_post_init__(self):
            self.old = made(self.policy)

    with pytest.raises(AssertionError, match=message):
        require_apart(subject_of(Own))


def test_a_view_of_the_trained_weights_under_another_name_may_be_held():
    class Viewed(Holding):
        def __attrs_post_init__(self):
            super().__attrs_post_init__()
            self.guided = Guided(self.policy, 2.0)
            self.students = {"one": self.policy}

    subject = subject_of(Viewed)
    assert held(subject.built()).keys() == {".policy", ".old", ".guided", ".students['one']"}
    require_apart(subject)


def test_an_objective_without_other_policies_has_nothing_to_keep_apart():
    @attrs.define(eq=False)
    class Alone(Objective):
        policy: Policy

        def phases(self):
            return (Phase({"policy": self.policy}, self._losses),)

        def _losses(self, batch, update):
            yield Loss(sum(parameter.square().sum() for parameter in self.policy.trainable_parameters().values()))

    with pytest.raises(NotApplicableError, match="it holds no policy beside those that it trains"):
        require_apart(subject_of(Alone))


def test_the_message_of_a_whole_contract_names_both_faults():
    class Both(Holding):
        def policies(self):
            return {"policy": self.policy}

        def __attrs_post_init__(self):
            self.old = self.policy.fork(trainable=True)

    with pytest.raises(PropertyError, match=r"(?s)FAIL  frozen reference.*FAIL  resumes"):
        require("Both", examine(subject_of(Both), OBJECTIVE))
    assert not TinyPolicy().fork().trainable_parameters()
