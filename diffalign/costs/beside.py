"""Text encoders and autoencoder of a pipeline, which are no weights of the policy."""

import attrs
from torch import nn

from ..core import Policy
from ..policies import FlowMatchingPolicy
from .rows import innermost
from .sizes import tensor_bytes


@attrs.frozen
class Beside:
    """Bytes of the other models of a pipeline.

    Args:
        total: bytes of all
        texts: bytes of the text encoders
        offloaded: whether they are on the device only while they work
    """

    total: int = 0
    texts: int = 0
    offloaded: bool = False


def beside_bytes(policy: Policy) -> Beside:
    """Count the bytes of text encoders and autoencoder; nothing if the policy has no pipeline."""
    inner = innermost(policy)
    if not isinstance(inner, FlowMatchingPolicy):
        return Beside()
    parts = {name: part for name, part in inner.family.pipeline.components.items() if isinstance(part, nn.Module)}
    sizes = {name: sum(map(tensor_bytes, part.parameters())) for name, part in parts.items() if name != inner.family.component}
    texts = sum(count for name, count in sizes.items() if name.startswith("text_encoder"))
    return Beside(sum(sizes.values()), texts, inner.family.setting.offload)
