"""The pretended device refuses what CUDA refuses, lets pass what CUDA lets pass, and counts what crosses."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from diffalign.testing import second_device
from diffalign.testing.pretended_device import MixedDevicesError


def far(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device="far")


def test_tensors_are_made_there_by_every_factory():
    here = torch.ones(2)
    made = [
        *(torch.zeros(2, device="far"), torch.arange(2, device="far"), torch.full((2,), 1.0, device="far"), torch.empty(2, device="far")),
        *(torch.tensor([1, 2], device="far"), torch.as_tensor([1.0], device="far"), torch.linspace(0, 1, 3, device="far")),
        *(here.to("far"), here.new_zeros(2, device="far"), torch.zeros_like(here, device="far"), here.to(far(1.0))),
    ]
    mine = far(1.0, 2.0)
    made += [mine.new_zeros(3), mine.new_tensor([1.0]), torch.zeros_like(mine), mine + 1, mine[mine > 1], mine.double(), mine.clone()]
    made += [
        torch.eye(2, device="far"),
        torch.arange(1, 4, device="far"),
        torch.arange(0, 1, 0.5, device="far"),
        torch.randperm(3, device="far"),
    ]
    assert all(tensor.device == torch.device("far", 0) and tensor.shape == tensor.cpu().shape for tensor in made)
    assert torch.arange(3, device="far").shape == torch.linspace(0, 1, 3, device="far").shape == (3,)
    assert mine.cpu().device.type == mine.to("cpu").device.type == "cpu"
    assert mine.tolist() == [1.0, 2.0]
    assert (float(mine[0]), int(mine[1]), bool(mine[0] > 0), mine[1].item()) == (1.0, 2, True, 2.0)
    assert torch.tensor([mine[0], mine[1]]).tolist() == [1.0, 2.0]


MIXTURES = {
    "sum": lambda: far(1.0, 2.0) + torch.ones(2),
    "product": lambda: torch.ones(2, 2) @ torch.ones(2, 2, device="far"),
    "cat": lambda: torch.cat([far(1.0), torch.ones(1)]),
    "stack of numbers": lambda: torch.stack([far(1.0)[0], torch.tensor(1.0)]),
    "where": lambda: torch.where(torch.tensor([True, False]), far(1.0, 2.0), far(0.0, 0.0)),
    "far index into near": lambda: torch.ones(3)[far(0, 1, dtype=torch.long)],
    "far mask into near": lambda: torch.ones(2)[far(1.0, 2.0) > 1],
    "gather": lambda: far(1.0, 2.0).gather(0, torch.tensor([0])),
    "index_add": lambda: far(1.0, 2.0).index_add(0, torch.tensor([0]), far(1.0)),
    "index_put": lambda: far(1.0, 2.0).index_put((far(0, 1, dtype=torch.long),), torch.ones(2)),
    "assignment": lambda: far(1.0, 2.0).__setitem__(far(0, 1, dtype=torch.long), torch.ones(2)),
    "searchsorted": lambda: torch.searchsorted(torch.arange(3.0), far(1.0)),
    "far number into near": lambda: torch.ones(2) + far(1.0)[0],
    "linear": lambda: nn.Linear(2, 2)(far(1.0, 2.0)),
    "embedding": lambda: nn.Embedding(3, 2).to("far")(torch.tensor([0])),
    "lerp": lambda: far(1.0).lerp_(torch.ones(1), 0.5),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_what_a_gpu_refuses_is_refused_with_the_place(mixture):
    with pytest.raises(MixedDevicesError, match=r"test_far_tensors\.py:\d+ <lambda>: aten\."):
        mixture()


def test_an_array_is_refused_as_of_a_gpu():
    for ask in (lambda: far(1.0).numpy(), lambda: np.asarray(far(1.0))):
        with pytest.raises(MixedDevicesError, match=r"has no numpy array; copy it to the CPU first"):
            ask()


def test_what_a_gpu_lets_pass_passes():
    mine = far(1.0, 2.0, 3.0)
    assert (mine * torch.tensor(2.0)).tolist() == [2.0, 4.0, 6.0]  # a CPU tensor without dimensions
    assert mine[torch.tensor([0, 2])].tolist() == [1.0, 3.0]  # an index on the CPU
    assert torch.where(mine > 1, mine, torch.tensor(0.0)).tolist() == [0.0, 2.0, 3.0]
    mine[far(0, dtype=torch.long)] = torch.tensor(7.0)
    assert mine.copy_(torch.arange(3.0)).tolist() == [0.0, 1.0, 2.0]
    assert torch.zeros(3).copy_(mine).tolist() == [0.0, 1.0, 2.0]


def test_a_network_trains_there_as_on_the_cpu():
    def trained(device):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1)).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.arange(6.0).reshape(2, 3).to(device)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        assert all(parameter.device.type == device for parameter in network.parameters())
        return torch.cat([parameter.detach().flatten().cpu() for parameter in network.parameters()])

    assert torch.equal(trained("far"), trained("cpu"))


def test_complex_numbers_have_their_gradients():
    def gradient(device):
        values = torch.arange(8.0).reshape(2, 2, 2).to(device).requires_grad_()
        turned = torch.view_as_complex(values) * torch.polar(torch.ones(2), torch.tensor([0.3, 1.1])).to(device)
        (torch.view_as_real(turned.conj().resolve_conj()) * torch.arange(2.0).to(device)).sum().backward()
        return values.grad.cpu()

    assert torch.equal(gradient("far"), gradient("cpu"))


def test_weights_that_are_given_another_type_in_place_have_it():
    layer = nn.Linear(2, 2).to("far")
    layer.weight.data = layer.weight.data.double()
    layer.bias.data = layer.bias.data.double() + 1
    assert layer.weight.dtype == torch.float64
    assert layer(far(0.0, 0.0, dtype=torch.float64)).tolist() == layer.bias.tolist()


def test_threads_see_the_device():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.tensor([1.0, 2.0], device="far") + far(1.0, 1.0)))
    thread.start()
    thread.join()
    assert found[0].tolist() == [2.0, 3.0]


def test_what_crosses_is_counted_with_its_place():
    with second_device() as traffic:
        mine = torch.ones(4, dtype=torch.float64).to("far")
        assert (traffic.bytes_up, traffic.bytes_down, traffic.copies, traffic.synchronizations) == (32, 0, 1, 1)
        torch.ones(4).to("far", non_blocking=True)
        assert (traffic.bytes_up, traffic.copies, traffic.synchronizations) == (48, 2, 1)
        mine[:2].cpu()
        assert (traffic.bytes_down, traffic.copies, traffic.synchronizations) == (16, 3, 2)
        mine.sum().item()
        mine[mine > 0]
        mine[torch.tensor([0])]
        assert traffic.synchronizations == 5
        mine * 2 + mine.clone()
        assert traffic.synchronizations == 5
    assert all(place.endswith("test_what_crosses_is_counted_with_its_place") for place in traffic.waits)
    assert sum(traffic.waits.values()) == 5
    far(1.0).cpu()
    assert traffic.synchronizations == 5  # outside, nothing is counted


def test_an_older_torch_is_refused_in_words(monkeypatch):
    import torch.utils.backend_registration as registration

    monkeypatch.delattr(registration, "_setup_privateuseone_for_python_backend")
    monkeypatch.setattr("diffalign.testing.pretended_device._libraries", [])
    with pytest.raises(RuntimeError, match=r"needs torch 2\.10 or newer; this is"), second_device():
        pass
