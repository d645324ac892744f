"""What losses on noised samples share: weights of units, errors under other weights, micro-batches, the old weights of a step."""

import attrs
import pytest
import torch
from chosen import batch_for
from tiny import assert_same, pair

from diffalign.core import Follower, Linear, Loss, NonFiniteError
from diffalign.objectives.draws import GridDraws
from diffalign.objectives.forward import ForwardLosses
from diffalign.objectives.noised import mean_square
from diffalign.samplers import Branching

ROWS = pytest.mark.parametrize("rows", [None, 1, 5, 1000])
MINE = {"draws": GridDraws(3, 0.0, shared=True), "name": "n", "objective": "Mine"}


def losses(decay=0.25, **options):
    policy, _ = pair()
    return ForwardLosses(policy, policy.fork(), Follower(decay, name="Mine.decay"), **{**MINE, **options})


def weights(policy):
    return policy.network.lora_B.weight


def move(policy, by):
    with torch.no_grad():
        weights(policy).add_(by)


def test_a_weighted_sum_is_the_mean_over_levels_samples_and_all_prompts():
    mine = losses()
    forward = mine.draw(batch_for(mine.policy), 0, None)
    assert (len(forward), forward.weight.dtype) == (3 * 4 * 3, torch.float64)
    values = torch.arange(36, dtype=torch.float64)
    assert float((forward.weight * values).sum()) == pytest.approx(float(values.reshape(3, 12).mean(dim=1).mean()))
    shares = [mine.draw(batch_for(mine.policy, groups=12), 0, None).weight.sum(), forward.weight.sum()]
    assert [float(share) for share in shares] == pytest.approx([0.25, 1.0])
    assert forward.group.tolist() == [prompt for prompt in range(3) for _ in range(12)]
    assert forward.size.tolist() == [4] * 36


@ROWS
def test_other_weights_cost_a_row_a_unit_and_have_no_graph(rows):
    mine = losses()
    _, other = pair()
    batch = batch_for(mine.policy)
    forward, before = mine.draw(batch, 0, rows), other.counter.rows
    velocity, error = forward.under(other, "other")
    assert other.counter.rows - before == len(forward)
    assert not velocity.requires_grad
    whole = forward.samples.at(torch.arange(36))
    assert_same(velocity, other.velocity(whole.latents, whole.sigma, whole.condition).detach())
    assert_same(error, mean_square(velocity - whole.target))


def test_other_weights_that_are_not_finite_are_named():
    mine = losses()
    forward = mine.draw(batch_for(mine.policy), 0, None)
    weights(mine.old).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"the velocity of the old weights is not finite at sigma .*, prompt 'a red cube'"):
        forward.under(mine.old, "old weights")


@ROWS
def test_the_gradients_of_micro_batches_add_up_to_that_of_the_whole(rows):
    mine = losses()
    batch = batch_for(mine.policy)
    forward = mine.draw(batch, 0, rows)
    whole = forward.samples.at(torch.arange(36))
    own = list(mine.policy.trainable_parameters().values())

    def gradient(found):
        return torch.cat([part.flatten() for part in torch.autograd.grad(sum(loss.value for loss in found), own)])

    error = whole.error(whole.velocity(mine.policy))
    coupled = forward.coupled(
        lambda noised, units: {"error": noised.error(noised.velocity(mine.policy))},
        lambda values: Loss((forward.weight * values["error"]).sum().square(), {}),
    )
    assert_same(gradient(coupled), gradient([Loss((error * forward.weight).sum().square(), {})]))
    error = whole.error(whole.velocity(mine.policy))
    apart = list(forward.apart(lambda noised, units: Loss((forward.weight[units] * noised.error(noised.velocity(mine.policy))).sum(), {})))
    assert len(apart) == (1 if rows is None else -(-36 // rows))
    assert_same(gradient(apart), gradient([Loss((error * forward.weight).sum(), {})]))


@pytest.mark.parametrize("rows", [None, 1, 5])
def test_a_loss_that_compares_some_units_evaluates_these_alone(rows):
    mine = losses()
    forward = mine.draw(batch_for(mine.policy), 0, rows)
    units = torch.tensor([30, 31, 4, 17])  # in any order
    own, seen = list(mine.policy.trainable_parameters().values()), []

    def evaluate(noised, some):
        seen.append(some)
        return {"error": noised.error(noised.velocity(mine.policy))}

    before = mine.policy.counter.rows
    parts = list(forward.coupled(evaluate, lambda values: Loss((values["error"] * torch.arange(4)).sum().square()), units))
    assert mine.policy.counter.rows - before == (4 if rows == 5 or rows is None else 8)
    assert torch.cat(seen)[-4:].tolist() == units.tolist()
    chosen = forward.samples.at(units)
    error = chosen.error(chosen.velocity(mine.policy))
    expected = torch.autograd.grad((error * torch.arange(4)).sum().square(), own)
    for got, wanted in zip(torch.autograd.grad(sum(part.value for part in parts), own), expected, strict=True):
        assert_same(got, wanted)


def test_the_units_of_a_sample_stand_together():
    mine = losses()
    forward = mine.draw(batch_for(mine.policy), 0, None)
    assert forward.sample.tolist() == [sample for sample in range(12) for _ in range(forward.samples.levels)]
    unit = forward.samples.at(torch.tensor([3 * 7 + 2]))
    assert torch.equal(unit.sigma, forward.samples.sigma[7, 2][None])
    assert unit.condition.prompts == (forward.batch.trajectories.condition.prompts[1],)


def test_the_loss_is_reported_as_a_mean_over_prompts():
    mine = losses()
    forward = mine.draw(batch_for(mine.policy, groups=12), 0, None)
    parts = [forward.reported(torch.tensor(0.5), 9), forward.reported(torch.tensor(0.25), 27)]
    total, count = (float(sum(column)) for column in zip(*parts, strict=True))
    assert (total, count) == (0.75 * 12, 3.0)


def test_each_update_draws_anew():
    mine = losses()
    batch = batch_for(mine.policy)
    first, again, second = (mine.draw(batch, update, None).samples.at(torch.arange(36)).target for update in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


def test_old_weights_follow_once_for_each_step():
    mine = losses(decay=Linear(0.0, 1.0, 4))
    start = weights(mine.old).clone()
    move(mine.policy, 1.0)
    mine.after_step()  # no batch has been seen
    assert torch.equal(weights(mine.old), start)
    for update in (0, 1, 0):  # two updates, and the step once more, as after memory ran out
        mine.draw(batch_for(mine.policy, step=1), update, None)
    assert torch.equal(weights(mine.old), start)
    mine.after_step()
    torch.testing.assert_close(weights(mine.old), start + 0.75)
    mine.after_step()
    torch.testing.assert_close(weights(mine.old), start + 0.75)


def test_without_old_weights_nothing_follows():
    mine = attrs.evolve(losses(), old=None)
    before = weights(mine.policy).detach().clone()
    mine.draw(batch_for(mine.policy), 0, None)
    mine.after_step()
    assert torch.equal(weights(mine.policy), before)


def test_the_budget_of_a_batch_is_that_of_its_pieces_alone():
    mine = losses()
    one, other = (mine.draw(batch_for(mine.policy), 0, rows) for rows in (8, 2))
    assert (max(map(len, one.pieces)), max(map(len, other.pieces))) == (8, 2)
    assert torch.equal(one.samples.at(torch.arange(36)).target, other.samples.at(torch.arange(36)).target)
    assert mine.update_rows(4) == 12


def test_what_cannot_be_is_refused_before_a_weight_moves():
    mine = losses(decay=1.5)
    with pytest.raises(ValueError, match=r"Mine.decay must lie in \[0, 1\]; got 1.5 at step 2"):
        mine.draw(batch_for(mine.policy), 0, None)
    with pytest.raises(ValueError, match="Mine needs at least 2 samples per prompt"):
        mine.draw(batch_for(mine.policy, Branching((1, 1, 1, 1), (0.0,) * 4)), 0, None)
    mine = losses(draws=GridDraws(7, 0.0, shared=True))
    with pytest.raises(ValueError, match=r"Mine.levels must be at most .* 6; got 7"):
        mine.draw(batch_for(mine.policy), 0, None)
