"""Low-rank layers of a policy, one by one."""

from collections.abc import Iterator

import attrs
from torch import Tensor

from diffalign.policies import FlowMatchingPolicy
from diffalign.policies.lora import ADAPTER


@attrs.frozen(eq=False)
class Layer:
    """Adapted linear layer, with the weight W + alpha / rank * up @ down.

    Args:
        path: path of the layer in the denoiser, with diffusers' names
        down: [rank, in]
        up: [out, rank]
        alpha: see above
    """

    path: str
    down: Tensor
    up: Tensor
    alpha: float


def layers(policy: FlowMatchingPolicy) -> Iterator[Layer]:
    """Yield the layers of a policy with adapters, on the CPU.

    Raises:
        ValueError: the policy has none.
    """
    if not policy.adapters:
        raise ValueError("this run trained all weights of the denoiser, so it has no LoRA; export it with --format merged")
    from peft import get_peft_model_state_dict

    network = policy.network
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(network, adapter_name=ADAPTER).items()
    }
    modules = dict(network.named_modules())
    for name in sorted(tensors):
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            scaling = modules[path].scaling[ADAPTER]
            yield Layer(path, tensors[name], tensors[f"{path}.lora_B.weight"], scaling * len(tensors[name]))
