"""Low-rank adapters on a denoiser."""

import difflib
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from safetensors import safe_open
from torch import nn

from diffalign.core import CheckpointError
from diffalign.core.words import allowed_word

from .saved_names import Layers, layer_paths
from .saved_scales import HEADER, PeftSettings
from .saved_tensors import FILE
from .warm_start import SavedAdapters

if TYPE_CHECKING:
    from .diffusers import Family


def _listed(targets: str | Sequence[str]) -> Sequence[str]:
    """List of targets; a single text is one target."""
    return (targets,) if isinstance(targets, str) else targets


def _finite(lora: "LoRA", attribute: "attrs.Attribute[float]", value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"LoRA.start_scale must be a finite number; got {value}")


ADAPTER = "default"
"""Name of the only adapter of a network; further sets of weights are forks, not adapters."""


@attrs.frozen
class LoRA:
    """Low-rank adapters on the denoiser, by peft. There is no dropout, because a replay could not be exact.

    Args:
        rank: rank of the update
        alpha: the update is scaled by alpha / rank
        targets: names of linear layers, or one name; each must match at least one. A full path means only that layer; another name means
            all layers whose path ends with it after a dot. None takes the family's usual layers
        init: "zero" and "gaussian" (with a Gaussian A) both start exactly at the base, because B = 0
        start: adapters to start from instead: a file, or a folder that diffusers, peft or an export wrote. It is read completely or
            refused. A fork(pristine=True) is still the base. Without `targets`, its layers are adapted
        start_scale: scale of these adapters, if their authors give one (0.125 for TDM's SD3 student)

    Reference: Hu et al., arXiv:2106.09685.
    """

    rank: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    alpha: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    targets: Sequence[str] | None = attrs.field(default=None, converter=attrs.converters.optional(_listed))
    init: Literal["zero", "gaussian"] = attrs.field(default="gaussian", validator=allowed_word)
    start: str | None = None
    start_scale: float = attrs.field(default=1.0, validator=_finite)

    def __attrs_post_init__(self) -> None:
        if self.targets is not None and not self.targets:
            raise ValueError("LoRA.targets must name at least one layer, or be None for the usual ones; got an empty list")
        if self.start is None and self.start_scale != 1.0:
            raise ValueError(f"LoRA.start_scale scales the adapters of LoRA.start, and there is none; got {self.start_scale}")

    def attach(self, network: Any, default_targets: Sequence[str], family: "Family | None" = None) -> None:
        """Freeze `network` and add the adapters, which are float32 for every type of the base.

        Above a base in bfloat16 the adapters of linear layers multiply in bfloat16.

        Args:
            network: the denoiser
            default_targets: layers that are adapted without `targets` and `start`
            family: family of the denoiser; without it, `start` is read only with diffusers' and peft's names of a transformer

        Raises:
            ValueError: a target matches no layer, or `start` cannot be read completely.
        """
        from peft import LoraConfig

        saved = None if self.start is None else _saved(self.start, network, family)
        network.requires_grad_(False)
        usual = default_targets if saved is None else sorted(saved.down)
        targets = list(usual if self.targets is None else self.targets)
        wanted = _layers(network, targets, required=self.targets is not None)
        _require_divisible(network, wanted, self.rank)
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


def require_scale(folder: Path, network: Any, component: str) -> None:
    """Refuse a network whose adapters are multiplied by another number than those that are saved in a folder: their tensors do not show it.

    Args:
        folder: folder of adapters in diffusers' form, whose header says the number; without it nothing is known
        network: network with adapters
        component: name of the denoiser in its pipeline

    Raises:
        CheckpointError: alpha / rank differ.
    """
    file = folder / FILE
    if not file.exists():
        return
    with safe_open(file, "pt") as content:
        header = (content.metadata() or {}).get(HEADER)
    saved, own = PeftSettings.of_header(header, component, f"{HEADER!r} in the header of {file}"), network.peft_config[ADAPTER]
    if saved is None or "r" not in saved.values:
        return
    alpha, rank = saved.values["lora_alpha"], saved.values["r"]
    if not math.isclose(alpha / rank, own.lora_alpha / own.r):
        raise CheckpointError(
            f"{folder}: its adapters must be multiplied by alpha / rank = {alpha / rank:g}; those of the policy are by "
            f"{own.lora_alpha / own.r:g}. Build the policy with LoRA.rank {rank} and LoRA.alpha {alpha}."
        )


def _saved(start: str, network: nn.Module, family: "Family | None") -> SavedAdapters:
    if family is None:
        return SavedAdapters.read(start, Layers.of(network, "transformer"))
    return SavedAdapters.read(start, Layers.of(network, family.component), family.renamed_lora)


def _require_divisible(network: nn.Module, wanted: Collection[str], rank: int) -> None:
    """Refuse a rank that peft cannot give a convolution of groups.

    Raises:
        ValueError: the message names the first such layer.
    """
    for path, module in network.named_modules():
        if path in wanted and isinstance(module, nn.Conv2d) and rank % module.groups:
            raise ValueError(
                f"LoRA.rank must be divisible by the groups of a convolution; {path!r} has {module.groups}, and the rank is {rank}. Leave "
                "the layer out of LoRA.targets or of LoRA.start"
            )


def _ends(network: nn.Module, targets: Sequence[str]) -> set[str]:
    """Layers that peft takes for a list of targets: each whose path ends with a target after a dot."""
    return {path for path in layer_paths(network) if any(path == target or path.endswith(f".{target}") for target in targets)}


def _layers(network: nn.Module, targets: Sequence[str], *, required: bool) -> set[str]:
    """Layers that the targets name. A full path means only that layer, even if another path ends with it.

    Raises:
        ValueError: a required target names no layer (peft would ignore it if another target does). The message suggests a similar name.
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
