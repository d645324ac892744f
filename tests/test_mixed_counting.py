"""Mixed precision, counted without a device: what torch.autocast casts, and the lines of a run that cannot be counted."""

from collections import Counter

import pytest
import torch
from test_planner import line
from test_roofline import build
from tiny_pipelines import saved
from torch import nn
from torch.nn import functional as F

from diffalign.costs import mixed
from diffalign.costs.activations import Activations
from diffalign.costs.capacity import Cluster, capacity
from diffalign.costs.cards import CARDS, card
from diffalign.costs.live import LiveBytes
from diffalign.costs.mixed import MixedPrecision
from diffalign.costs.operators import CAST, PRODUCT, counting, differentiate
from diffalign.costs.rows import Counted
from diffalign.costs.utilisation import meter_of
from diffalign.policies import FlowMatchingPolicy, LoRA, products
from diffalign.prompts import Prompts
from diffalign.testing import TinyPolicy

HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def loaded(name="sd3", **settings):
        torch.manual_seed(0)
        given = {"resolution": 32, "lora": None, "device": "cpu", "compute": "bfloat16", **settings}
        if name == "sd3":
            given["max_sequence_length"] = 24
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), **given)

    return loaded


def counted(policy):
    return Counted.of(policy, policy.encode(Prompts(["a"]).draw(0, 1)))


def of_weight(call, *kinds):
    return Counter((one.name, one.dtype, one.moved) for one in call.operators if one.kind in kinds)


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_products_are_in_the_type_of_the_run_and_as_many_as_ever(name, load):
    plain, half = (counted(load(name, compute=compute))(2) for compute in (None, "bfloat16"))
    for one, other in ((plain.forward, half.forward), (plain.backward, half.backward)):
        assert {operator.dtype for operator in one.of(PRODUCT).operators} == {FULL}
        assert {operator.dtype for operator in other.of(PRODUCT).operators} == {HALF}
        assert other.useful == one.useful
    assert half.peak < 0.9 * plain.peak
    norms = [operator for operator in half.forward.operators if operator.name in ("native_layer_norm", "native_group_norm")]
    assert norms
    assert {operator.dtype for operator in norms} == {FULL}


@pytest.mark.parametrize("settings", [{}, {"lora": LoRA(rank=2)}, {"checkpointing": True}], ids=str)
def test_what_is_cast_is_what_torch_casts(settings, load, monkeypatch):
    """Against torch.autocast on the CPU, which leaves norms alone: same products, same casts, same bytes that live."""
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(mixed, "_FLOAT32", frozenset())
    monkeypatch.setattr(mixed, "_SUMS", frozenset())
    policy, rows = load(**settings), 3
    found = counted(policy).run(rows)
    condition = policy.encode(Prompts(["a"]).draw(0, 1)).select(torch.zeros(rows, dtype=torch.long))
    with LiveBytes() as live, counting() as taken, torch.enable_grad():
        velocity = policy.velocity(torch.zeros(rows, *policy.latent_shape), torch.full((rows,), 0.5), condition)
        forward = taken()
        differentiate(velocity, list(policy.trainable_parameters().values()))
        backward = taken()
    for mine, real in ((found.forward, forward), (found.backward, backward)):
        assert of_weight(mine, PRODUCT, CAST) == of_weight(real, PRODUCT, CAST)
        assert len(of_weight(real, CAST)) > 1
    assert found.peak == pytest.approx(live.peak, rel=0.05)  # the CPU's kernel of a norm keeps other numbers


def test_a_trained_weight_is_cast_once_and_a_frozen_one_each_time():
    trained, frozen, x = (torch.ones(4, 4, device="meta", requires_grad=some) for some in (True, False, False))

    def casts(keeps):
        with counting() as taken, MixedPrecision(HALF, keeps=keeps):
            for weight in (trained, trained, frozen, frozen):
                assert F.linear(x, weight).dtype == HALF
        return len(taken().of(CAST).operators)

    assert casts(keeps=True) == 1 + 2 + 4
    assert casts(keeps=False) == 2 + 2 + 4


def test_sums_powers_and_mixtures_are_in_the_type_that_torch_takes():
    half, full = torch.ones(2, 3, device="meta", dtype=HALF), torch.ones(2, 3, device="meta")
    double, here = torch.ones(2, 3, device="meta", dtype=torch.float64), torch.ones(2, 3)
    with MixedPrecision(HALF):
        assert (half**2).dtype == half.sum().dtype == half.softmax(-1).dtype == F.layer_norm(half, (3,)).dtype == FULL
        assert (half.flatten() @ full.flatten()).dtype == torch.einsum("ij,ij->i", half, full).dtype == HALF
        assert torch.dot(half.flatten(), full.flatten()).dtype == FULL
        assert (half + half).dtype == half.relu().dtype == HALF
        assert half.sum(dtype=torch.float64).dtype == double.exp().dtype == torch.float64
        assert F.linear(here, here).dtype == FULL  # numbers that are there are nobody's to cast


def test_check_counts_a_run_in_mixed_precision(load):
    loop = build(load())
    activations = Activations.of(loop)
    assert activations.source == "counted operator by operator"
    text = capacity(loop, Cluster(memory=80.0, card=card("h100")), activations)
    assert f"of {CARDS['h100'].half / 1e12:.4g} TFLOP/s" in line(text, "expected on h100")
    assert "fit 80 GiB at once" in line(text, "row budget")
    assert {"least on h100", "fused", "one more prompt", "operators"} <= {row.split("  ")[0] for row in text.splitlines()}


def test_the_share_of_the_peak_is_of_the_same_operations(load):
    plain, half = (meter_of(build(load(compute=compute)), teraflops=1.0) for compute in (None, "bfloat16"))
    assert (half.forward, half.backward) == (plain.forward, plain.backward)


class Looking(TinyPolicy):
    """Looks at numbers, which a network without memory does not have."""

    def velocity(self, latents, sigma, condition):
        return super().velocity(latents, sigma, condition) * (1.0 if float(latents.sum()) > 0 else 0.5)


def packed(policy):
    """The same with a weight that is no number, as of a quantised layer."""
    policy.network.register_parameter("packed", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    return policy


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            lambda load: packed(load(compute=None, lora=LoRA(rank=2))),
            "ValueError: counting needs whole weights in a floating type; some are",
        ),
        (lambda load: Looking(), "RuntimeError: Tensor.item() cannot be called on meta tensors"),
    ],
    ids=["quantised", "looking"],
)
def test_what_cannot_be_counted_says_so_in_its_own_line(made, reason, load):
    text = capacity(build(made(load)), Cluster(memory=80.0, card=card("h100")))
    assert line(text, "expected on h100").split("  ")[-1].startswith(f"not known, because its operators cannot be counted: {reason}")
    assert line(text, "memory of a device").split("  ")[-1].startswith("about ")
    assert "fit 80 GiB at once" in line(text, "row budget")
    assert "least on h100" not in text
