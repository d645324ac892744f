"""Low-rank adapters on a denoiser."""

from collections.abc import Sequence
from typing import Any, Literal

import attrs

from .warm_start import SavedAdapters

ADAPTER = "default"
"""Name of the one adapter that a network carries; other weight sets are forks, not adapters."""


@attrs.frozen
class LoRA:
    """Low-rank adapters on the denoiser, through peft. Dropout is not offered: replay could not be exact.

    Args:
        rank: of the update
        alpha: the update is scaled by alpha / rank
        targets: names (suffixes) of the linear layers; None takes the family's usual ones
        init: "zero" starts at the base exactly (B = 0); "gaussian" likewise, with a Gaussian A
        start: adapters to start at instead, as diffusers or peft saved them; a fork(pristine=True) is still the base. Without `targets`
            their layers are adapted
        start_scale: of them, where their authors say that they must be loaded with one (0.125 for TDM's SD3 student)

    Reference: Hu et al., arXiv:2106.09685.
    """

    rank: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    alpha: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    targets: Sequence[str] | None = None
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
