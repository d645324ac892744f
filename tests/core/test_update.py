"""What an update leaves behind when it fails, what it says, and what it does when memory runs out."""

import attrs
import pytest
import torch
from safetensors.torch import load_file

from diffalign import AlignmentLoop
from diffalign.core import (
    Loss,
    NonFiniteError,
    NonFiniteRewardError,
    Objective,
    Phase,
    Progress,
    RunningScale,
    SingleProcess,
    TrajectorySampler,
    finite,
)
from diffalign.core.budget import shrink
from diffalign.objectives import FlowGRPO, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.runs.offending import keep_offending_batch
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

PROMPTS = Prompts(["a red cube", "two blue stars"], shuffle=False)
TREE = TreeSampler(5, FixedPlan(splits=(1, 2)))


def build(objective, sampler=TREE, rewards=channel_reward, **options):
    return AlignmentLoop(objective, sampler, rewards, PROMPTS, prompts_per_step=2, **options)


def tensors(loop):
    return {f"{role}.{name}": p.detach().clone() for role, policy in loop.policies().items() for name, p in policy.named_parameters()}


@attrs.define(eq=False)
class Trailing(Objective):
    """Two updates a step; `old` follows after each, a counter counts them, and from a step on the second has a NaN."""

    policy: TinyPolicy
    fails_at: int
    how: str = "loss"
    count: int = 0
    old: TinyPolicy = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.old = self.policy.fork()

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses, 2),)

    def policies(self):
        return {"policy": self.policy, "old": self.old}

    def after_update(self, role):
        self.count += 1
        self.old.lerp_(self.policy, 0.5)

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]

    def _losses(self, batch, update):
        bad = batch.progress.step == self.fails_at and update == 1
        for parameter in self.policy.trainable_parameters().values():
            if bad and self.how == "gradient":
                parameter.register_hook(lambda gradient: gradient * float("nan"))
            yield Loss(parameter.square().sum() * (float("nan") if bad and self.how == "loss" else 1.0))


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_forks_and_state_that_followed_an_update_are_put_back(how):
    loop = build(Trailing(TinyPolicy(), fails_at=1, how=how))
    loop.run(1)
    before, state = tensors(loop), loop.running["policy"].state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(NonFiniteError, match=rf"role 'policy', step 1: {how}"):
        loop.run(2, start=1)
    after = tensors(loop)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert loop.objective.count == 2
    assert torch.equal(loop.running["policy"].state_dict()["state"][0]["exp_avg"], state)
    assert all(parameter.grad is None for parameter in loop.objective.policy.parameters())


class BlindWhenTrained(TinyPolicy):
    """NaN for one prompt, wherever a graph is kept."""

    def velocity(self, latents, sigma, condition):
        velocity = super().velocity(latents, sigma, condition)
        bad = (condition.ids == 1) & torch.tensor(self.blind)
        return torch.where(bad[:, None], float("nan"), velocity)

    blind = False


@attrs.define(eq=False)
class Direct(Objective):
    """The mean square of the velocities at the samples."""

    policy: TinyPolicy

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses),)

    def _losses(self, batch, update):
        forest = batch.trajectories
        yield Loss(
            self.policy.velocity(forest.latents, forest.sigmas[forest.level], forest.condition.select(forest.prompt)).square().mean()
        )


def test_an_objective_that_finds_it_first_is_told_whose_turn_it_was():
    policy = BlindWhenTrained()
    reward = lambda images, prompts: (setattr(policy, "blind", True), channel_reward(images, prompts))[1]  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"^role 'policy', step 0: replay: the log-prob .* prompt 'two blue stars'") as caught:
        build(SoftmaxTB(policy, TinyPolicy().fork()), rewards=reward, check_rows=0).run(1)
    assert caught.value.evidence is not None


def test_a_velocity_that_is_not_finite_in_the_update_is_named_by_role_level_and_prompt(tmp_path):
    policy = BlindWhenTrained()
    reward = lambda images, prompts: (setattr(policy, "blind", True), channel_reward(images, prompts))[1]  # noqa: E731
    loop = build(Direct(policy), rewards=reward, check_rows=0)
    before = tensors(loop)
    message = (
        r"^role 'policy', step 0: loss is nan. The velocity of 'policy' is not finite at level 0 \(sigma 1\), prompt 'two blue stars'. "
        "Nothing was updated.$"
    )
    with pytest.raises(NonFiniteError, match=message) as caught:
        loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert all(torch.equal(value, before[name]) for name, value in tensors(loop).items())

    file = keep_offending_batch(caught.value, tmp_path, rank=3)
    kept = load_file(file)
    assert file == tmp_path / "offending" / "batch-3.safetensors"
    assert kept["latents"].shape[1:] == policy.latent_shape
    assert kept["rewards"].shape == kept["reward/<lambda>"].shape == (18,)
    assert kept["condition/embedding"].shape == (2, 4)
    assert '"two blue stars"' in file.with_suffix(".json").read_text()
    assert keep_offending_batch(ValueError("no evidence"), tmp_path) is None


def test_a_reward_that_is_not_finite_has_evidence_too(tmp_path):
    loop = build(SoftmaxTB(TinyPolicy()), rewards=lambda images, prompts: torch.full((len(images),), float("inf")))
    with pytest.raises(NonFiniteRewardError, match="returned inf for image 0 of 18, prompt 'a red cube'") as caught:
        loop.run(1)
    assert "latents" in load_file(keep_offending_batch(caught.value, tmp_path))


# --- what an objective or a sampler gives that is no loss, no phase, no forest ----------------------------------------------


@attrs.define(eq=False)
class Given(Objective):
    """One or two phases, the last of which has the losses that are given."""

    policy: TinyPolicy
    given: object
    before: bool = False

    def phases(self):
        last = Phase({"policy": self.policy}, self.losses)
        return (Phase({"first": self.policy}, self._learned), last) if self.before else (last,)

    def losses(self, batch, update):
        return self.given(self, batch)

    def _learned(self, batch, update):
        yield Loss(sum(parameter.square().sum() for parameter in self.policy.trainable_parameters().values()))


def detached(objective, batch):
    yield Loss(torch.tensor(1.0))
    yield Loss(torch.tensor(2.0))


@pytest.mark.parametrize("before", [False, True])
def test_losses_without_a_graph_are_refused_and_nothing_moves(before):
    loop = build(Given(TinyPolicy(), detached, before))
    weights = tensors(loop)
    message = r"step 0: the losses of 'policy' carry no gradient: of 2 that Given.losses yielded, none has a graph.* Nothing was updated"
    with pytest.raises(ValueError, match=message):
        loop.advance(1)
    assert all(torch.equal(value, weights[name]) for name, value in tensors(loop).items())


@pytest.mark.parametrize(
    ("given", "rewards"),
    [
        (lambda objective, batch: iter(()), channel_reward),
        (detached, lambda images, prompts: torch.ones(len(images))),
        (lambda objective, batch: (Loss(0.0 * loss.value) for loss in objective._learned(batch, 0)), channel_reward),
        (lambda objective, batch: [*detached(objective, batch), *objective._learned(batch, 0)], channel_reward),
    ],
    ids=["a role that rests", "equal rewards", "a gradient of zero", "one loss of several"],
)
def test_losses_without_a_graph_are_no_error_where_there_may_be_nothing_to_learn(given, rewards):
    build(Given(TinyPolicy(), given), rewards=rewards).advance(1)


def test_an_objective_that_has_learned_may_leave_out_a_step():
    given = lambda objective, batch: detached(objective, batch) if batch.progress.step else objective._learned(batch, 0)  # noqa: E731
    build(Given(TinyPolicy(), given)).advance(2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda objective, batch: None, "Given.losses, the losses of 'policy', must `yield` each Loss; it returned NoneType"),
        (lambda objective, batch: torch.tensor(1.0), "must `yield` each Loss; it returned Tensor"),
        (lambda objective, batch: Loss(torch.tensor(1.0)), "must `yield` each Loss; it returned Loss"),
        (lambda objective, batch: [torch.tensor(1.0)], "must yield Loss objects, `yield Loss\\(value\\)`; it yielded Tensor"),
    ],
)
def test_what_is_no_loss_is_named_with_the_function_that_gave_it(given, message):
    with pytest.raises(ValueError, match=message):
        build(Given(TinyPolicy(), given)).advance(1)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (lambda self: Phase({"policy": self.policy}, self.losses), r"Own.phases must return a tuple of Phase.*; it returned Phase"),
        (lambda self: None, "Own.phases must return a tuple of Phase.*; it returned NoneType"),
        (lambda self: (self.losses,), "Own.phases must return a tuple of Phase.*; it holds method"),
        (lambda self: (Phase(self.policy, self.losses),), "Phase.trains must be a dict of role -> Policy"),
        (
            lambda self: (Phase({"policy": "policy"}, self.losses),),
            "Phase.trains must be a dict of role -> Policy.* got {'policy': 'policy'}",
        ),
        (lambda self: (Phase({"policy": self.policy}, detached(self, None)),), "Phase.losses must be a function.* got generator"),
    ],
)
def test_what_is_no_phase_is_refused_when_the_run_is_built(phases, message):
    kind = type("Own", (Given,), {"phases": phases})
    with pytest.raises(ValueError, match=message):
        build(kind(TinyPolicy(), detached))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3), r"Mute.sample must return a TrajectoryBatch; it returned Tensor\.$"),
        (None, "it returned NoneType. Does it end without"),
    ],
)
def test_what_is_no_forest_is_named_with_its_sampler(given, message):
    class Mute(TrajectorySampler):
        def sample(self, policy, condition, progress, streams):
            return given

    with pytest.raises(ValueError, match=message):
        build(SoftmaxTB(TinyPolicy()), sampler=Mute()).advance(1)


# --- memory -----------------------------------------------------------------------------------------------------------------


class Small(TinyPolicy):
    """A device on which no more than a number of rows fits a call."""

    def __init__(self, *arguments, fits=1000, **options):
        super().__init__(*arguments, **options)
        self.fits = fits

    def velocity(self, latents, sigma, condition):
        velocity = super().velocity(latents, sigma, condition)
        if len(latents) > self.fits:
            raise torch.OutOfMemoryError(f"tried to allocate {len(latents)} rows")
        return velocity


def test_out_of_memory_halves_the_rows_until_they_fit_and_changes_no_result(capsys):
    expected = build(SoftmaxTB(Small(), TinyPolicy().fork(), updates=2))
    expected.run(3)
    loop = build(SoftmaxTB(Small(fits=3), TinyPolicy().fork(), updates=2), check_rows=2)
    loop.run(3)
    for name, value in tensors(expected).items():
        torch.testing.assert_close(tensors(loop)[name], value, rtol=1e-6, atol=1e-6)
    assert (loop.sampler.rows, loop.objective.rows) == (3, 2)
    said = capsys.readouterr().err.splitlines()
    assert (
        said
        == [
            "step 0: out of memory after calls of up to 6 rows: sampler.rows is 3 from now on, in all 1 processes",
            "step 0: out of memory after calls of up to 8 rows: objective.rows is 4 from now on, in all 1 processes",
            "step 0: out of memory after calls of up to 4 rows: objective.rows is 2 from now on, in all 1 processes",
        ]
        or said
    )


def test_a_step_that_is_repeated_for_memory_is_observed_once():
    loop = build(SoftmaxTB(Small(fits=3), TinyPolicy().fork()), aggregation=RunningScale())
    loop.advance(2)
    assert loop.objective.rows == 2  # the update was repeated, after the scores were observed
    (weight,) = loop.aggregation.state()["weights"].values()
    assert weight == pytest.approx(1 - 0.95**2)


def test_memory_that_rewards_run_out_of_halves_the_images(capsys):
    def reward(images, prompts):
        if len(images) > 5:
            raise torch.OutOfMemoryError("images")
        return channel_reward(images, prompts)

    loop = build(SoftmaxTB(TinyPolicy()), rewards=reward)
    loop.run(2)
    assert loop.chunk == 4
    assert "chunk is 4 from now on" in capsys.readouterr().err


def test_where_nothing_is_left_to_halve_the_error_says_what_to_try():
    said = r"tried to allocate 1 rows\nOne network row of the rollout does not fit .* Try --policy.dtype bfloat16"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        build(SoftmaxTB(Small(fits=0), TinyPolicy().fork())).run(1)


def test_calls_that_are_larger_than_the_budget_do_not_end_the_halving():
    sampler = ChainSampler(rows=4)
    given = (SoftmaxTB(TinyPolicy()), 64, SingleProcess())
    budgets = shrink(sampler, *given, "contract", 8, torch.OutOfMemoryError("full"), False)  # a row twice, for its rounding
    assert budgets.sampler.rows == 2
    with pytest.raises(torch.OutOfMemoryError, match="One network row of the contract does not fit"):
        shrink(attrs.evolve(sampler, rows=1), *given, "contract", 2, torch.OutOfMemoryError("full"), False)


class Broken(Small):
    """NaN where there is a gradient."""

    def velocity(self, latents, sigma, condition):
        velocity = super().velocity(latents, sigma, condition)
        return velocity * float("nan") if torch.is_grad_enabled() else velocity


@pytest.mark.parametrize("full", [False, True])
def test_a_number_that_is_not_finite_is_the_error_even_where_memory_is_short(full, monkeypatch):
    """The search for its place makes calls as small as those of the step; where even they do not fit, it says so."""

    def no_room(*_):
        raise torch.OutOfMemoryError("full")

    if full:
        monkeypatch.setattr(finite, "_first_bad_velocity", no_room)
    where = "Where it came from is not known: memory ran out" if full else "The velocities at the states of the batch are finite"
    with pytest.raises(NonFiniteError, match=rf"role 'policy', step 0: loss is nan\. {where}"):
        build(FlowGRPO(Broken(fits=3), rows=3), attrs.evolve(TREE, rows=3)).run(1)


def test_a_sampler_without_a_budget_is_not_repeated_for_ever():
    class Own(TrajectorySampler):
        def sample(self, policy, condition, progress, streams):
            return TREE.sample(policy, condition, progress, streams)

    with pytest.raises(torch.OutOfMemoryError, match="Nothing is left to halve"):
        build(SoftmaxTB(Small(fits=3), TinyPolicy().fork()), sampler=Own()).run(1)


def test_a_step_needs_a_prompt_for_every_process():
    with pytest.raises(ValueError, match="prompts_per_step must be at least 3, one for each process"):
        build(SoftmaxTB(TinyPolicy()), devices=SingleProcess(0, 3))
