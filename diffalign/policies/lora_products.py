"""Products of adapters in the type of the base: the factors are stored and trained in float32, and multiplied in bfloat16."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TypeOfBase:
    """Computes y + s B (A x) in the type of y, and adds the last product to y.

        h = x round(A)^T,   y <- y + s h round(B)^T,   y = W x + b

    peft multiplies in the type of the factors: it casts x to float32, multiplies without tensor cores, and writes B h, s B h, y + s B h and
    their cast, each as large as y. Here there are only the two products and two casts of the factors. Autograd casts the gradients of the
    rounded factors back, so pieces of an update add up in float32.

    peft calls such an object a variant (`LoraVariant`): it computes in place of the layer, as for DoRA. The adapter itself, its names and
    its files stay the plain ones.

    Reference: Hu et al., arXiv:2106.09685.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        down, up = (factors[active_adapter].weight.to(result.dtype) for factors in (module.lora_A, module.lora_B))
        inner = F.linear(x.to(result.dtype), down)
        flat = result.reshape(-1, result.shape[-1])
        # y is new and nobody else's; where autograd watches it is a view, and writing into it would cost copies of gradients
        add = flat.addmm if torch.is_grad_enabled() else flat.addmm_
        return add(inner.flatten(0, -2), up.t(), alpha=module.scaling[active_adapter]).view(result.shape)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight.data - delta.to(orig_weight.dtype)


def multiply_in_type_of_base(network: nn.Module, adapter: str) -> None:
    """Let the adapters of linear layers multiply in the type of the base. peft still computes the adapters of convolutions.

    Args:
        network: network with adapters
        adapter: name of the adapters
    """
    from peft.tuners.lora.layer import LoraLayer  # slow to import, and seldom needed

    for module in network.modules():
        if isinstance(module, LoraLayer) and isinstance(dict(module.lora_A).get(adapter), nn.Linear):
            module.lora_variant[adapter] = cast(Any, TypeOfBase())  # no subclass of peft's, which would need the import above
            module.cast_input_dtype_enabled = False
