"""Recorded calls: the numbers of the calls as they are, at any moment, on a recorder of the CPU that runs operators again as a GPU does."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tape import Tape
from torch import nn

from diffalign.policies import CallGraphs
from diffalign.policies.call_graphs import RecordedCalls


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.unused = nn.Linear(3, 3), nn.Parameter(torch.zeros(2))
        self.calls = 0

    def forward(self, latents, sigma, asked):
        self.calls += 1
        return torch.tanh(self.inner(latents)) * sigma[:, None] + asked


def recorded(recorder, **settings):
    torch.manual_seed(0)
    network = Network()
    calls = RecordedCalls(network, CallGraphs(**{"gradients": True, **settings}), recorder)
    return network, lambda *inputs, state=0: calls(lambda x, s, c: network(x, s, c["asked"]), state, *inputs)


def inputs(rows, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=drawn), torch.rand(rows, generator=drawn), {"asked": torch.randn(rows, 3, generator=drawn)}


def plain(network, given):
    return network(given[0], given[1], given[2]["asked"])


@torch.no_grad()
def test_the_third_call_of_a_shape_is_replayed_and_computes_the_same():
    recorder = Tape()
    network, call = recorded(recorder)
    for seed in range(6):
        for rows in (1, 4):
            given = inputs(rows, seed)
            assert torch.equal(call(*given), plain(network, given))
        assert recorder.recorded == (0 if seed == 0 else 2)
        assert recorder.replayed == 2 * max(0, seed - 1)
    assert recorder.pools == 1


@torch.no_grad()
def test_a_result_is_not_overwritten_by_the_next_call():
    network, call = recorded(Tape())
    results = [(call(*inputs(4, seed)), plain(network, inputs(4, seed))) for seed in range(6)]
    assert all(torch.equal(found, expected) for found, expected in results)


@torch.no_grad()
def test_weights_that_are_written_are_used_and_weights_that_moved_are_recorded_anew():
    recorder = Tape()
    network, call = recorded(recorder)
    for seed in range(4):
        call(*inputs(4, seed))
    network.inner.weight.mul_(2)
    assert torch.equal(call(*inputs(4, 9)), plain(network, inputs(4, 9)))
    assert recorder.recorded == 1
    network.inner.weight.data = network.inner.weight.data * 3
    for seed in range(3):
        assert torch.equal(call(*inputs(4, seed)), plain(network, inputs(4, seed)))
    assert recorder.recorded == 2


@torch.no_grad()
def test_recordings_of_weights_that_moved_give_their_places_to_other_shapes():
    recorder = Tape()
    network, call = recorded(recorder, most=2)
    for rows in (2, 3, 4):
        for seed in range(3):
            call(*inputs(rows, seed))
    assert recorder.recorded == 2
    network.inner.weight.data = network.inner.weight.data.clone()
    for rows in (4, 5):
        for seed in range(3):
            assert torch.equal(call(*inputs(rows, seed)), plain(network, inputs(rows, seed)))
    assert recorder.recorded == 4


@torch.no_grad()
def test_another_state_is_another_call():
    recorder = Tape()
    _, call = recorded(recorder)
    for _ in range(3):
        for state in ("adapters", "none"):
            call(*inputs(4), state=state)
    assert recorder.recorded == 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("recorder", "settings"),
    [(Tape(share=0.79), {}), (Tape(share=0.5), {"bound": 0.51}), (Tape(), {"most": 1})],
)
def test_what_is_not_worth_it_is_not_recorded(recorder, settings):
    network, call = recorded(recorder, **settings)
    for seed in range(4):
        for rows in (2, 3) if settings.get("most") else (2,):
            assert torch.equal(call(*inputs(rows, seed)), plain(network, inputs(rows, seed)))
    assert recorder.recorded == settings.get("most", 0)


def test_gradients_are_those_of_the_call_as_it_is():
    recorder = Tape()
    network, call = recorded(recorder)
    for seed in range(5):
        given = inputs(4, seed)
        velocity = call(*given)
        velocity.square().sum().backward()
        found = {name: weight.grad for name, weight in network.named_parameters()}
        network.zero_grad(set_to_none=True)
        expected = plain(network, given)
        expected.square().sum().backward()
        assert torch.equal(velocity, expected)
        for name, weight in network.named_parameters():
            assert (found[name] is None) == (weight.grad is None)
            assert weight.grad is None or torch.equal(found[name], weight.grad)
        network.zero_grad(set_to_none=True)
    assert recorder.recorded == 2  # forward and backward
    assert recorder.pools == 2  # activations have memory of their own


def test_gradients_are_not_recorded_unless_it_is_asked_for():
    recorder = Tape()
    network, call = recorded(recorder, gradients=False)
    for seed in range(4):
        call(*inputs(4, seed)).sum().backward()
        with torch.no_grad():
            call(*inputs(4, seed))
    assert recorder.recorded == 1
    assert network.calls == 4 + 4  # without gradient: two, one to warm up and one to record


def test_a_weight_in_two_places_has_one_gradient():
    network, _ = recorded(Tape())
    network.other = nn.Module()
    network.other.weight = network.inner.weight
    calls = RecordedCalls(network, CallGraphs(gradients=True), Tape())
    for seed in range(4):
        network.zero_grad(set_to_none=True)
        calls(lambda x, s, c: network(x @ network.other.weight, s, c["asked"]), 0, *inputs(4, seed)).square().sum().backward()
    found = network.inner.weight.grad.clone()
    network.zero_grad(set_to_none=True)
    latents, sigma, asked = inputs(4, 3)
    network(latents @ network.other.weight, sigma, asked["asked"]).square().sum().backward()
    torch.testing.assert_close(found, network.inner.weight.grad)
    assert network.other.weight is network.inner.weight


def test_gradients_of_pieces_add_up():
    network, call = recorded(Tape())
    for seed in range(3):
        call(*inputs(4, seed)).sum().backward()
    network.zero_grad(set_to_none=True)
    for seed in (3, 4, 5):
        call(*inputs(4, seed)).square().sum().backward()
    found = network.inner.weight.grad.clone()
    network.zero_grad(set_to_none=True)
    for seed in (3, 4, 5):
        plain(network, inputs(4, seed)).square().sum().backward()
    assert torch.equal(found, network.inner.weight.grad)


def test_a_call_before_the_backward_pass_of_the_last_one_runs_as_it_is():
    recorder = Tape()
    network, call = recorded(recorder)
    for seed in range(3):
        call(*inputs(4, seed)).sum().backward()
    network.zero_grad(set_to_none=True)
    before = recorder.replayed
    several = [call(*inputs(4, seed)) for seed in (3, 4, 5)]
    assert recorder.replayed == before + 1
    sum(each.square().sum() for each in several).backward()
    found = network.inner.weight.grad.clone()
    network.zero_grad(set_to_none=True)
    sum(plain(network, inputs(4, seed)).square().sum() for seed in (3, 4, 5)).backward()
    torch.testing.assert_close(found, network.inner.weight.grad)
    call(*inputs(4, 6))  # its graph is dropped: the next call is replayed again
    gc.collect()
    before = recorder.replayed
    call(*inputs(4, 7))
    assert recorder.replayed == before + 1


def test_a_second_backward_pass_is_refused():
    _, call = recorded(Tape())
    for seed in range(3):
        loss = call(*inputs(4, seed)).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward pass of a recorded call runs once"):
        loss.backward()


@torch.no_grad()
def test_weights_that_are_replaced_are_seen():
    recorder = Tape()
    network, call = recorded(recorder)
    for turn in range(4):
        for seed in range(3):
            assert torch.equal(call(*inputs(4, seed)), plain(network, inputs(4, seed)))
        if turn == 0:
            network.inner.weight = nn.Parameter(torch.randn(3, 3))
        elif turn == 1:
            network.load_state_dict({name: 2 * tensor for name, tensor in network.state_dict().items()}, assign=True)
        elif turn == 2:
            network.inner = nn.Linear(3, 3)
    assert recorder.recorded == 4


def test_weights_that_are_trained_from_now_on_have_gradients():
    network, call = recorded(Tape())
    network.requires_grad_(False)
    network.inner.weight.requires_grad_()
    for seed in range(3):
        call(*inputs(4, seed)).sum().backward()
    network.inner.bias.requires_grad_()
    for seed in range(4):
        network.zero_grad(set_to_none=True)
        call(*inputs(4, seed)).square().sum().backward()
    found = network.inner.bias.grad.clone()
    network.zero_grad(set_to_none=True)
    plain(network, inputs(4, 3)).square().sum().backward()
    assert torch.equal(found, network.inner.bias.grad)


def test_calls_in_inference_mode_run_as_they_are():
    recorder = Tape()
    network, call = recorded(recorder)
    for turn in range(2):
        for seed in range(4):
            with torch.inference_mode() if turn == 0 else torch.no_grad():
                assert torch.equal(call(*inputs(4, seed)), plain(network, inputs(4, seed)))
        assert recorder.recorded == turn


@torch.no_grad()
def test_a_call_within_a_call_runs_as_it_is():
    torch.manual_seed(0)
    network, recorder = Network(), Tape()
    calls = RecordedCalls(network, CallGraphs(), recorder)

    def inner(latents, sigma, tensors):
        return network(latents, sigma, tensors["asked"])

    def outer(latents, sigma, tensors):
        return calls(inner, "inner", calls(inner, "inner", latents, sigma, tensors), sigma, tensors)

    for seed in range(4):
        latents, sigma, tensors = inputs(4, seed)
        assert torch.equal(calls(outer, "outer", latents, sigma, tensors), inner(inner(latents, sigma, tensors), sigma, tensors))


@torch.no_grad()
def test_a_call_that_fails_leaves_the_others_free():
    torch.manual_seed(0)
    network = Network()
    calls = RecordedCalls(network, CallGraphs(), Tape())

    def fails(latents, sigma, tensors):
        raise ValueError("no such prompt")

    for _ in range(3):
        with pytest.raises(ValueError, match="no such prompt"):
            calls(fails, 0, *inputs(4))
        assert torch.equal(calls(lambda x, s, c: network(x, s, c["asked"]), 1, *inputs(4)), plain(network, inputs(4)))


@torch.no_grad()
def test_two_threads_do_not_mix_their_calls():
    network, call = recorded(Tape())
    given = [inputs(4, seed) for seed in range(200)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    expected = [plain(network, each) for each in given]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda each: call(*each), given))
    sys.setswitchinterval(before)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_memory_of_activations_counts_over_all_recordings():
    recorder = Tape(held=0.008)
    network, call = recorded(recorder, held=0.02)
    for rows in (2, 3, 4):
        for seed in range(3):
            call(*inputs(rows, seed)).sum().backward()
    assert recorder.recorded == 2 * 2
    network.inner.weight.data = network.inner.weight.data.clone()
    for _ in range(3):
        call(*inputs(2)).sum().backward()  # its first recording is forgotten, and its memory counts no more
    assert recorder.recorded == 3 * 2


@torch.no_grad()
def test_memory_that_runs_out_while_recording_costs_that_call_alone(capsys):
    recorder = Tape(refuses=(False,), error=torch.OutOfMemoryError)
    network, call = recorded(recorder)
    for seed in range(3):
        assert torch.equal(call(*inputs(2, seed)), plain(network, inputs(2, seed)))
    recorder.refuses = ()
    for seed in range(3):
        for rows in (2, 3):
            assert torch.equal(call(*inputs(rows, seed)), plain(network, inputs(rows, seed)))
    assert recorder.recorded == 1
    assert "cannot be recorded" not in capsys.readouterr().err


@torch.no_grad()
def test_weights_that_processes_share_are_not_recorded():
    recorder = Tape()
    network, call = recorded(recorder)
    network.inner.weight.full_tensor = lambda: network.inner.weight
    for seed in range(4):
        for rows in (2, 3):
            assert torch.equal(call(*inputs(rows, seed)), plain(network, inputs(rows, seed)))
    assert recorder.recorded == 0


def test_inputs_that_carry_gradient_run_as_they_are():
    recorder = Tape()
    network, call = recorded(recorder)
    for _ in range(4):
        latents, sigma, asked = inputs(4)
        latents.requires_grad_()
        found = torch.autograd.grad(call(latents, sigma, asked).sum(), latents)[0]
        torch.testing.assert_close(found, torch.autograd.grad(plain(network, (latents, sigma, asked)).sum(), latents)[0])
    assert recorder.recorded == 0


@torch.no_grad()
def test_under_autocast_of_the_caller_calls_run_as_they_are():
    recorder = Tape()
    _, call = recorded(recorder)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(4):
            call(*inputs(4, seed))
    assert recorder.recorded == 0


def test_a_network_that_is_not_trained_needs_no_backward_pass():
    recorder = Tape()
    network, call = recorded(recorder)
    network.requires_grad_(False)
    for seed in range(4):
        assert torch.equal(call(*inputs(4, seed)), plain(network, inputs(4, seed)))
    assert recorder.recorded == 1


def test_a_refusal_is_said_once_and_the_calls_run_as_they_are(capsys):
    recorder = Tape(refuses=(True,))
    network, call = recorded(recorder)
    for seed in range(4):
        for rows in (2, 3):
            call(*inputs(rows, seed)).square().sum().backward()
            found = network.inner.weight.grad.clone()
            network.zero_grad(set_to_none=True)
            plain(network, inputs(rows, seed)).square().sum().backward()
            assert torch.equal(found, network.inner.weight.grad)
            network.zero_grad(set_to_none=True)
            with torch.no_grad():
                assert torch.equal(call(*inputs(rows, seed)), plain(network, inputs(rows, seed)))
    assert recorder.recorded == 2  # those without gradient
    said = capsys.readouterr().err
    assert said.count("call graphs: calls of Network with gradient cannot be recorded and run as they are") == 1
    assert "(RuntimeError: operation not permitted when stream is capturing)" in said


@pytest.mark.parametrize("wrong", [{"bound": 0.0}, {"bound": 1.1}, {"most": 0}, {"held": -0.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CallGraphs(**wrong)
