"""Which attention kernels and roundings a GPU may take once a policy is loaded; torch's switches are there without a GPU too."""

import pytest
import torch
from tiny_pipelines import BUILD, saved

from diffalign.policies import FlowMatchingPolicy, LoRA, flow_matching
from diffalign.policies.arithmetic import attention_kernels, enabled_kernels, keep_float32, set_attention, tf32

ALL = ("flash", "efficient", "cudnn", "math")
SAFE = ("flash", "efficient", "math")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def switches():
    """Switches and backends of the process, put back as torch and diffusers have them."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    assert enabled_kernels() == list(ALL)
    assert tf32() == {"products": False, "convolutions": True}
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    for name in ("flash", "mem_efficient", "cudnn", "math"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def network(name):
    pipeline = BUILD[name]()
    return getattr(pipeline, "transformer", None) or pipeline.unet


@pytest.mark.parametrize(
    ("attention", "dispatched", "expected"),
    [
        (None, True, SAFE),
        (None, False, SAFE),
        ("native", True, ALL),
        ("native", False, ALL),
        ("Native", True, ALL),
        ("flash", True, SAFE),
        ("_native_cudnn", True, SAFE),  # diffusers opens it for the call
        ("_native_cudnn", False, ("cudnn", "math")),
        ("_native_flash", False, ("flash", "math")),
        ("_NATIVE_EFFICIENT", False, ("efficient", "math")),
        ("_native_math", False, ("math",)),
    ],
)
def test_cudnn_is_taken_only_where_it_is_named(attention, dispatched, expected):
    assert attention_kernels(attention, dispatched) == expected


@pytest.mark.parametrize("attention", ["flash", "math", "_native_xla", "fastest"])
def test_a_name_that_layers_cannot_go_by_is_refused(attention):
    with pytest.raises(ValueError, match=f'"native" or one of "_native_flash", .* call torch directly; got {attention!r}'):
        set_attention(network("sd3"), attention, CPU)


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "sana", "sd15"])
def test_a_policy_on_a_gpu_leaves_cudnn_out(name):
    set_attention(network(name), None, CUDA)
    assert enabled_kernels() == list(SAFE)
    set_attention(network(name), "native", CUDA)
    assert enabled_kernels() == list(ALL)


@pytest.mark.parametrize(
    ("name", "outside", "inside"), [("sd3", ["cudnn", "math"], ["cudnn", "math"]), ("flux-dev", list(SAFE), ["cudnn"])]
)
def test_cudnn_by_name_is_what_the_layers_get(name, outside, inside, monkeypatch):
    from diffusers.models import attention_dispatch

    policy_network, met = network(name), []
    set_attention(policy_network, "_native_cudnn", CUDA)
    assert enabled_kernels() == outside

    def attention(query, *rest, **more):
        met.append(enabled_kernels())
        return torch.zeros_like(query)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(attention_dispatch._AttentionBackendRegistry, "_checks_enabled", False)
    layers = [module for module in policy_network.modules() if callable(getattr(module, "processor", None))]
    width = layers[0].to_q.in_features
    tokens = torch.zeros(1, 4, width)
    more = {"encoder_hidden_states": tokens} if getattr(layers[0], "added_kv_proj_dim", None) else {}
    layers[0](tokens, **more)
    assert met == [inside]


def test_the_policy_that_is_loaded_last_decides():
    set_attention(network("sd3"), "_native_math", CUDA)
    set_attention(network("sd3"), None, CUDA)
    assert enabled_kernels() == list(SAFE)


def test_a_cpu_changes_nothing():
    for attention in (None, "_native_math"):
        set_attention(network("sd3"), attention, CPU)
    keep_float32(CPU)
    assert enabled_kernels() == list(ALL)
    assert tf32()["convolutions"]


def test_float32_on_a_gpu_has_no_tf32():
    keep_float32(CUDA)
    assert tf32() == {"products": False, "convolutions": False}
    torch.backends.cudnn.allow_tf32 = True  # by hand, after loading
    assert tf32()["convolutions"]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_who_allows_tf32_in_products_keeps_it_in_convolutions(precision):
    torch.set_float32_matmul_precision(precision)
    keep_float32(CUDA)
    assert tf32() == {"products": True, "convolutions": True}


@pytest.mark.parametrize(
    ("options", "exact"), [({}, True), ({"dtype": "bfloat16"}, False), ({"compute": "bfloat16"}, False)], ids=["float32", "half", "mixed"]
)
def test_loading_a_policy_sets_both(tmp_path_factory, monkeypatch, options, exact):
    said = []
    monkeypatch.setattr(flow_matching, "set_attention", lambda network, *choice: said.append(choice))
    monkeypatch.setattr(flow_matching, "keep_float32", said.append)
    folder = saved(tmp_path_factory, "flux-dev")
    policy = FlowMatchingPolicy.from_pretrained(folder, lora=LoRA(rank=2), resolution=32, device="cpu", attention="_native_math", **options)
    assert said == [("_native_math", CPU), *([CPU] if exact else [])]
    assert policy.attention == policy.fork().attention == "_native_math"
