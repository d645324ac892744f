"""Low-rank adapters on a denoiser."""

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import nn

from .saved_names import Layers, layer_paths
from .warm_start import SavedAdapters

if TYPE_CHECKING:
    from .diffusers import Family


def _listed(targets: Sequence[str]) -> Sequence[str]:
    """One text is one target."""
    return (targets,) if isinstance(targets, str) else targets


ADAPTER = "default"
"""Name of the one adapter that a network carries; other weight sets are forks, not adapters."""


@attrs.frozen
class LoRA:
    """Low-rank adapters on the denoiser, through peft. Dropout is not offered: replay could not be exact.

    Args:
        rank: of the update
        alpha: the update is scaled by alpha / rank
        targets: names of the linear layers; each must name one at least. A whole path is that layer alone, anything else the end of
            paths at a dot. None takes the family's usual ones
        init: "zero" starts at the base exactly (B = 0); "gaussian" likewise, with a Gaussian A
        start: adapters to start at instead: a file, or the folder that diffusers, peft or an export wrote. It is read as a whole or
            refused; a fork(pristine=True) is still the base. Without `targets` its layers are adapted
        start_scale: of them, where their authors say that they must be loaded with one (0.125 for TDM's SD3 student)

    Reference: Hu et al., arXiv:2106.09685.
    """

    rank: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    alpha: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    targets: Sequence[str] | None = attrs.field(default=None, converter=attrs.converters.optional(_listed))
    init: Literal["zero", "gaussian"] = "gaussian"
    start: str | None = None
    start_scale: float = 1.0

    def attach(self, network: Any, default_targets: Sequence[str], family: "Family | None" = None) -> None:
        """Freeze `network` and add the adapters, in float32 whatever the base is. Above a base in bfloat16 they multiply in bfloat16.

        Args:
            network: the denoiser
            default_targets: what is adapted without `targets` and `start`
            family: of the denoiser; without it `start` is read under the names of a transformer in diffusers and peft alone

        Raises:
            ValueError: a target that names no layer, or a start that is not read as a whole.
        """
        from peft import LoraConfig

        saved = None if self.start is None else _saved(self.start, network, family)
        network.requires_grad_(False)
        usual = default_targets if saved is None else sorted(saved.down)
        targets = list(usual if self.targets is None else self.targets)
        wanted = _layers(network, targets, required=self.targets is not None)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets if wanted == _ends(network, targets) else "|".join(map(re.escape, sorted(wanted))),
            init_lora_weights=True if self.init == "zero" else "gaussian",
        )
        try:
            network.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"LoRA.targets must name linear layers of {type(network).__name__}; got {targets}: {error}") from error
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if (network.dtype if family is None else family.dtype) is torch.bfloat16:  # float16 would round small gradients to zero
            from .lora_products import multiply_in_type_of_base

            multiply_in_type_of_base(network, ADAPTER)
        if saved is not None:
            saved.fill(network, ADAPTER, self.start_scale)


def _saved(start: str, network: nn.Module, family: "Family | None") -> SavedAdapters:
    if family is None:
        return SavedAdapters.read(start, Layers.of(network, "transformer"))
    return SavedAdapters.read(start, Layers.of(network, family.component), family.renamed_lora)


def _ends(network: nn.Module, targets: Sequence[str]) -> set[str]:
    """The layers that peft takes for a list: each whose path ends so at a dot."""
    return {path for path in layer_paths(network) if any(path == target or path.endswith(f".{target}") for target in targets)}


def _layers(network: nn.Module, targets: Sequence[str], *, required: bool) -> set[str]:
    """The layers that are asked for. A whole path means that layer alone, also where it is the end of another's path.

    Raises:
        ValueError: a required target names no layer, which peft passes over where another one does; with the layer whose name is nearest.
    """
    names = layer_paths(network)
    wanted: set[str] = set()
    for target in targets:
        found = {target} if target in names else {name for name in names if name.endswith(f".{target}")}
        wanted |= found
        if found or not required:
            continue
        ends = {".".join(name.split(".")[-count:]) for name in names for count in range(1, name.count(".") + 2)}
        nearest = difflib.get_close_matches(target, sorted(end for end in ends if not end[0].isdigit()), n=1, cutoff=0.0)
        raise ValueError(
            f"LoRA.targets must each name a linear layer of {type(network).__name__}, by its path or the end of it; {target!r} names none"
            f"{f' (nearest: {nearest[0]!r})' if nearest else ''}"
        )
    return wanted
