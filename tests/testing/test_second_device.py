"""The contracts run a part on the pretended device: what mixes devices is named with its place, and nothing that was given is changed."""

import threading

import attrs
import pytest
import torch
from started import start
from tiny_pipelines import saved

from diffalign.cli import main
from diffalign.core import Condition, Edges, Loss, Objective, Phase, Reward, TrajectorySampler, replay_log_prob
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.rewards import Cached, WorkerReward
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import PropertyError, TinyPolicy, check_objective, check_policy, check_reward, check_sampler, elsewhere
from diffalign.testing.policy_contract import POLICY
from diffalign.testing.pretended_device import FarTensor, has_gradients, second_device
from diffalign.testing.properties import examine
from diffalign.testing.sampler_contract import SAMPLER

NAME = "a second device"
PLACE = r"tests/testing/test_second_device\.py:\d+ "


def finding(check, part, **options):
    """What became of the property; all others hold."""
    try:
        findings = check(part, **options)
    except PropertyError as error:
        findings = error.findings
    assert [found.name for found in findings if found.failure] in ([], [NAME])
    return next(found for found in findings if found.name == NAME)


# --- policies ------------------------------------------------------------------------------------------------------------------


class Planted(TinyPolicy):
    """Subclassed for the test only."""

    fault = ""

    def encode(self, prompts):
        condition = super().encode(prompts)
        if self.fault == "encode":
            return Condition(condition.prompts, condition.ids, {name: tensor.cpu() for name, tensor in condition.tensors.items()})
        return condition

    def prior(self, noise):
        return noise.to(self.dtype) if self.fault == "prior" else super().prior(noise)

    def velocity(self, latents, sigma, condition):
        value = super().velocity(latents, sigma, condition)
        if self.fault == "velocity":
            value = value * torch.ones(len(latents), 1, 1)
        if self.fault == "other numbers" and latents.device.type != "cpu":
            value = value * 1.01
        return value

    def decode(self, latents):
        return super().decode(latents).cpu() if self.fault == "decode" else super().decode(latents)

    def fork(self, *, trainable=False, pristine=False):
        twin = super().fork(trainable=trainable, pristine=pristine)
        twin.fault = self.fault
        return twin


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("encode", r"encode's tensors\['embedding'\] must be on the policy's device, far:0; got one on cpu"),
        ("prior", r"prior must be on the policy's device, far:0; got one on cpu"),
        ("velocity", rf"MixedDevicesError: {PLACE}velocity: aten\.mul"),
        ("decode", r"decode must be on the policy's device"),
        ("other numbers", r"velocity differs from that on the CPU by"),
    ],
)
def test_a_policy_that_mixes_devices_is_caught(fault, said):
    policy = Planted((2, 2))
    policy.fault = fault
    with pytest.raises(PropertyError, match=said) as caught:
        check_policy(policy)
    assert [found.name for found in caught.value.findings if found.failure] == [NAME]


def test_the_policy_that_was_given_stays_where_it_is():
    policy = TinyPolicy((2, 2))
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    parameters = list(policy.parameters())
    assert not finding(check_policy, policy).failure
    assert all(now is then for now, then in zip(policy.parameters(), parameters, strict=True))
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert policy.shares_tensors, "other properties have forked it"
    with pytest.raises(RuntimeError, match="forks share tensors"):
        policy.to("cpu")


def test_a_pipeline_goes_there_with_its_encoders(tmp_path_factory):
    def policy(offload):
        torch.manual_seed(0)
        options = {"lora": LoRA(rank=2), "resolution": 32, "max_sequence_length": 24, "device": "cpu"}
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, "sd3"), offload=offload, **options)

    only = [known for known in POLICY if known.name == NAME]
    for part in (policy(False), policy(True), TDMPolicy(policy(False), steps=2)):
        (found,) = examine(part, only)
        assert not found.failure
        assert not found.skipped
        assert {parameter.device.type for parameter in part.parameters()} == {"cpu"}


def test_what_cannot_be_moved_is_skipped_with_the_reason():
    class Locked(TinyPolicy):
        def __init__(self, *args):
            super().__init__(*args)
            self.lock = threading.Lock()

    class Fixed(TinyPolicy):
        def _apply(self, fn, recurse=True):
            raise RuntimeError("quantised weights stay")

    class Weightless(TinyPolicy):
        def parameters(self, recurse=True):
            return iter(())

    only = [known for known in POLICY if known.name == NAME]
    assert "it cannot be copied, and the original must not be moved: TypeError" in examine(Locked((2, 2)), only)[0].skipped
    assert examine(Fixed((2, 2)), only)[0].skipped == "it cannot be moved: quantised weights stay"
    assert "it has no weights on the CPU that could be moved" in examine(Weightless((2, 2)), only)[0].skipped


# --- samplers ------------------------------------------------------------------------------------------------------------------

TREE = TreeSampler(5, FixedPlan((1, 2), branches=2))


@attrs.frozen
class Mixing(TrajectorySampler):
    fault: str
    inner: TrajectorySampler = TREE

    def sample(self, policy, condition, progress, streams):
        forest = self.inner.sample(policy, condition, progress, streams)
        if self.fault == "mixes":
            assert (forest.path_sum(forest.log_prob) * torch.ones(len(forest.leaves))).isfinite().all()
        if self.fault == "brings home":
            return attrs.evolve(forest, latents=forest.latents.cpu(), mean=forest.mean.cpu())
        return forest


def test_a_sampler_that_mixes_devices_is_caught():
    assert finding(check_sampler, Mixing("")).failure == ""
    assert not finding(check_sampler, Mixing("")).skipped
    with pytest.raises(PropertyError, match=rf"MixedDevicesError: {PLACE}sample: aten\.mul"):
        check_sampler(Mixing("mixes"))
    with pytest.raises(PropertyError, match=r"latents of the forest must be on the policy's device"):
        check_sampler(Mixing("brings home"))


@attrs.define
class Numbering(TrajectorySampler):
    calls: int = 0

    def sample(self, policy, condition, progress, streams):
        self.calls += 1
        return TREE.sample(policy, condition, progress, streams)


def test_a_sampler_with_a_state_keeps_it():
    sampler = Numbering()
    (found,) = examine(sampler, [known for known in SAMPLER if known.name == NAME])
    assert not found.failure
    assert not found.skipped
    assert sampler.calls == 0, "a copy is drawn from"


# --- objectives ----------------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Gradient(Objective):
    """A policy gradient that looks at the weights after each update."""

    policy: object
    fault: str = ""
    scale: object = attrs.field(init=False, default=1.0)

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses),)

    def after_update(self, role):
        if self.fault == "after the update":
            flat = torch.cat([parameter.detach().flatten() for parameter in self.policy.trainable_parameters().values()])
            self.scale = float((flat * torch.ones(len(flat))).abs().mean())

    def _losses(self, batch, update):
        from diffalign.objectives.terms import centered

        forest = batch.trajectories
        if not len(forest.stochastic):
            raise ValueError("Gradient needs stochastic trajectories")
        edges = Edges.of(forest)
        log_prob = replay_log_prob(self.policy, forest, edges)
        path = forest.path_sum(log_prob.new_zeros(len(forest.latents)).index_copy(0, edges.child, log_prob))
        advantage = centered(batch.rewards.double(), forest.group)
        if self.fault == "loss":
            advantage = advantage * torch.ones(len(advantage))
        if self.fault == "other numbers" and path.device.type != "cpu":
            advantage = advantage * 1.01
        yield Loss(-(advantage * path).sum() / batch.groups)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("loss", rf"MixedDevicesError: {PLACE}_losses: aten\.mul"),
        ("after the update", rf"MixedDevicesError: {PLACE}after_update: aten\.mul"),
        ("other numbers", r"a loss differs from that on the CPU by|the gradient of 'policy' differs from that on the CPU by"),
    ],
)
def test_an_objective_that_mixes_devices_is_caught(fault, said):
    with pytest.raises(PropertyError, match=said) as caught:
        check_objective(lambda policy: Gradient(policy, fault))
    assert [found.name for found in caught.value.findings if found.failure] == [NAME]


def test_an_objective_that_does_not_passes():
    found = finding(check_objective, Gradient)
    assert not found.failure
    assert not found.skipped


# --- rewards -------------------------------------------------------------------------------------------------------------------


class Network(Reward):
    """A network that is built when it is first asked for; with `follows` it goes where the images are."""

    def __init__(self, follows):
        self.follows, self.layer = follows, None

    def __call__(self, images, prompts):
        if self.layer is None:
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
        layer = self.layer.to(images.device) if self.follows else self.layer
        return layer(images.mean(dim=(2, 3))).squeeze(1)


def test_a_reward_that_mixes_devices_is_caught():
    def weighted(images, prompts):
        return images.mean(dim=(1, 2, 3)) * torch.linspace(1, 1, len(images))

    with pytest.raises(PropertyError, match=rf"raised MixedDevicesError for 8 images: {PLACE}weighted: aten\.mul"):
        check_reward(weighted)
    with pytest.raises(PropertyError, match=rf"raised MixedDevicesError for 8 images: {PLACE}__call__: aten\."):
        check_reward(Network(follows=False))
    with pytest.raises(PropertyError, match=rf"MixedDevicesError for 8 images: {PLACE}<lambda>: a tensor on far:0 has no numpy array"):
        check_reward(lambda images, prompts: images.numpy().mean(axis=(1, 2, 3)))


def test_rewards_that_do_not_pass_and_stay_where_they_are(tmp_path, monkeypatch):
    network = Network(follows=True)
    assert not finding(check_reward, network).failure
    assert not isinstance(network.layer.weight.data, FarTensor)
    shared = Network(follows=True)
    assert not finding(check_reward, lambda images, prompts: shared(images, prompts)).failure  # a function is not copied
    assert shared.layer.weight.device.type == "cpu"
    assert shared.layer(torch.ones(1, 3)).isfinite().all()
    assert not finding(check_reward, Cached(lambda images, prompts: images[:, 0].mean(dim=(1, 2)).tolist())).failure
    (tmp_path / "far_contract.py").write_text("def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    worker = WorkerReward("far_contract:red", timeout=60.0)
    found = finding(check_reward, worker)  # it holds a process, which cannot be copied
    assert not found.failure
    assert not found.skipped
    worker.close()


def test_what_only_a_real_device_has_is_no_failure():
    class Address(Reward):
        def __call__(self, images, prompts):
            assert images.untyped_storage().data_ptr()
            return images.mean(dim=(1, 2, 3))

    assert "it needs more than the pretended device has" in finding(check_reward, Address()).skipped


# --- where there is no such device ---------------------------------------------------------------------------------------------


def test_an_older_torch_and_another_accelerator_skip_it(monkeypatch):
    def old():
        raise RuntimeError("the pretended device needs torch 2.10 or newer; this is 2.6")

    monkeypatch.setattr(elsewhere, "register", old)
    assert finding(check_sampler, TREE).skipped == "the pretended device needs torch 2.10 or newer; this is 2.6"
    monkeypatch.undo()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert "would replace cuda; hide that" in finding(check_sampler, TREE).skipped


def test_without_it_nothing_is_left_behind():
    check_reward(lambda images, prompts: images.mean(dim=(1, 2, 3)))
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    with second_device():
        assert torch.accelerator.is_available()
        assert torch.accelerator.device_count() == 1
        assert has_gradients()


LATE = """
import torch
torch.ones(1, requires_grad=True).backward()
from diffalign.objectives import SoftmaxTB
from diffalign.testing.objective_contract import OBJECTIVE, subject_of
from diffalign.testing.properties import examine
print(*examine(subject_of(SoftmaxTB), OBJECTIVE[-1:]))
"""


def test_after_a_backward_pass_it_is_skipped_with_advice(tmp_path):
    """torch counts devices then, and never again; here conftest.py has called `prepare_second_device`."""
    (tmp_path / "late.py").write_text(LATE)
    done = start(tmp_path / "late.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skip  a second device: a backward pass was made in this process before the pretended device was known")
    assert "call diffalign.testing.prepare_second_device() first" in done.stdout


def test_the_command_names_the_place(tmp_path, monkeypatch, capsys):
    body = "import torch\n\ndef mixed(images, prompts):\n    return images.mean(dim=(1, 2, 3)) + torch.zeros(len(images))\n"
    (tmp_path / "mixing_part.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check-part", "mixing_part:mixed"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  a second device: on a GPU it would fail, or compute on the wrong device" in said
    assert "mixing_part.py:4 mixed: aten.add.Tensor got tensors on far:0, shapes (8,), and on the CPU, shapes (8,)" in said
    assert "6 of 7 properties hold" in said
