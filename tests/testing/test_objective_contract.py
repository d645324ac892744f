"""What the contract of objectives takes together, and what it says of a failure."""

import attrs
import pytest
import torch

from diffalign.core import Edges, Loss, Objective, Phase, Policy, group_normalize, micro_batched, replay_log_prob
from diffalign.testing import PropertyError, check_objective
from diffalign.testing.objective_contract import OBJECTIVE
from diffalign.testing.objective_subject import subject_of
from diffalign.testing.properties import examine


def findings(make, *names):
    return examine(subject_of(make), [known for known in OBJECTIVE if known.name in names])


@attrs.define(eq=False)
class Rounded(Objective):
    """A policy gradient whose log-probabilities pass through another type."""

    policy: Policy
    kind: torch.dtype = torch.float64
    off: float = 0.0
    rows: int | None = None

    def phases(self):
        return (Phase({"policy": self.policy}, self.losses),)

    def losses(self, batch, update):
        forest, edges = batch.trajectories, Edges.of(batch.trajectories)
        advantage = forest.node_mean(group_normalize(batch.rewards, forest.group).double())[edges.child]

        def evaluate(parents):
            return {"log_prob": replay_log_prob(self.policy, forest, edges.below(parents)).to(self.kind)}

        def loss_of(values):
            return Loss(-((advantage * values["log_prob"]).sum() + values["log_prob"].square().sum()) / batch.groups)

        scale = 1.0 if self.rows is None else 1.0 + self.off
        for loss in micro_batched(evaluate, len(edges.parent), loss_of, self.rows):
            yield Loss(loss.value * scale)


def test_a_gap_as_small_as_the_rounding_of_float32_is_named():
    failures = [finding.failure for finding in findings(lambda policy: Rounded(policy, torch.float32), "groups apart", "row budget")]
    assert any(failures)
    for failure in filter(None, failures):
        assert "This looks like float32 rounding: the contract computes in float64" in failure
        assert "torch.promote_types(policy.precision, torch.float32)" in failure


@pytest.mark.parametrize("off", [0.1, 1e-3])
def test_a_larger_gap_is_not(off):
    (finding,) = findings(lambda policy: Rounded(policy, off=off), "row budget")
    assert "with 1 rows a micro-batch: the gradient of 'policy' differs by" in finding.failure
    assert "float32" not in finding.failure


def test_float64_has_no_gap():
    assert not any(finding.failure for finding in findings(Rounded, "groups apart", "row budget"))


@attrs.define(eq=False)
class Forgetful(Objective):
    """Two trained roles, of which `policies()` names one. The loop keeps both, because it takes the trained roles too."""

    policy: Policy
    fake: Policy = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.fake = self.policy.fork(trainable=True)

    def policies(self):
        return {"policy": self.policy}

    def phases(self):
        return (Phase({"fake": self.fake}, self.fitted), Phase({"policy": self.policy}, self.taught))

    def fitted(self, batch, update):
        yield self._loss(self.fake, batch)

    def taught(self, batch, update):
        yield self._loss(self.policy, batch)

    def _loss(self, policy, batch):
        forest, edges = batch.trajectories, Edges.of(batch.trajectories)
        advantage = forest.node_mean(group_normalize(batch.rewards, forest.group).double())[edges.child]
        return Loss(-(advantage * replay_log_prob(policy, forest, edges)).sum() / batch.groups)


def test_a_trained_role_that_policies_leaves_out_is_looked_at_as_the_loop_does():
    found = check_objective(Forgetful)
    assert [finding.name for finding in found if finding.skipped] == ["row budget", "frozen reference"]


@attrs.define(eq=False)
class Leaking(Forgetful):
    """The policy's loss leaves a gradient in the role that is not named."""

    def taught(self, batch, update):
        mine, other = self._loss(self.policy, batch), self._loss(self.fake, batch)
        yield Loss(mine.value + 0 * other.value)


def test_a_gradient_that_leaks_into_such_a_role_is_seen():
    with pytest.raises(PropertyError, match="the phase that trains policy leaves a gradient in 'fake'"):
        check_objective(Leaking)


def test_a_metric_with_a_name_of_the_loop_is_found():
    @attrs.define(eq=False)
    class Clashing(Rounded):
        def losses(self, batch, update):
            for loss in super().losses(batch, update):
                yield Loss(loss.value, {"reward/mine": (torch.tensor(1.0), torch.tensor(1))})

    (finding,) = findings(Clashing, "metrics")
    assert "Clashing yielded a loss with the metric 'reward/mine', a name of the loop's own" in finding.failure
