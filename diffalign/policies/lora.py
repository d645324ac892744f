"""Low-rank adapters on a denoiser."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import attrs
from torch import nn

from .warm_start import SavedAdapters


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
        targets: names of the linear layers, whole paths or their ends at a dot; each must name one at least. None takes the family's
            usual ones
        init: "zero" starts at the base exactly (B = 0); "gaussian" likewise, with a Gaussian A
        start: adapters to start at instead, as diffusers or peft saved them; a fork(pristine=True) is still the base. Without `targets`
            their layers are adapted
        start_scale: of them, where their authors say that they must be loaded with one (0.125 for TDM's SD3 student)

    Reference: Hu et al., arXiv:2106.09685.
    """

    rank: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    alpha: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    targets: Sequence[str] | None = attrs.field(default=None, converter=attrs.converters.optional(_listed))
    init: Literal["zero", "gaussian"] = "gaussian"
    start: str | None = None
    start_scale: float = 1.0

    def attach(self, network: Any, default_targets: Sequence[str]) -> None:
        """Freeze `network` and add the adapters, in float32 whatever the base is."""
        from peft import LoraConfig

        saved = None if self.start is None else SavedAdapters.read(self.start)
        network.requires_grad_(False)
        usual = default_targets if saved is None else sorted(saved.down)
        targets = list(usual if self.targets is None else self.targets)
        if self.targets is not None:
            _require_layers(network, targets)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=targets, init_lora_weights=True if self.init == "zero" else "gaussian"
        )
        try:
            network.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"LoRA.targets must name linear layers of {type(network).__name__}; got {targets}: {error}") from error
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if saved is not None:
            saved.fill(network, ADAPTER, self.start_scale)


def _require_layers(network: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a target that names no layer, which peft passes over where another one does.

    Raises:
        ValueError: naming it, and the layer whose name is nearest.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        ends = {".".join(name.split(".")[-count:]) for name in names for count in range(1, name.count(".") + 2)}
        nearest = difflib.get_close_matches(target, sorted(end for end in ends if not end[0].isdigit()), n=1, cutoff=0.0)
        raise ValueError(
            f"LoRA.targets must each name a linear layer of {type(network).__name__}, by its path or the end of it; {target!r} names none"
            f"{f' (nearest: {nearest[0]!r})' if nearest else ''}"
        )
