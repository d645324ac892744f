"""Existing adapters as the start of a run: a few-step student, or a LoRA of somebody else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .saved_names import Layers, Name
from .saved_scales import BESIDE, HEADER, PeftSettings, agreed, sources
from .saved_tensors import FoundTensors, content_of, file_of

_OTHER = "Is it for another model? Otherwise load it in plain diffusers and save it from there."

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Function that converts names of a model's first authors to those of diffusers."""


@attrs.frozen(eq=False)
class SavedAdapters:
    """Low-rank layers of a file, by path of the layer in the denoiser.

    Args:
        down: first matrices, each [rank, in, ...]
        up: second matrices, each [out, rank, ...]
        scaling: factor of each product
    """

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    scaling: Mapping[str, float]

    @classmethod
    def read(cls, path: str, layers: Layers, convert: Convert | None = None) -> "SavedAdapters":
        """Read a file completely, or refuse it.

        Args:
            path: a safetensors file, or a folder with a file of diffusers, of peft, or with a single safetensors file
            layers: layers of the denoiser
            convert: converts names that are not diffusers' own; None converts none

        Raises:
            ValueError: there is no such file, or it holds something that is not supported; the message names the first such tensor or
                setting.
        """
        file = file_of(path)
        tensors, header = content_of(file)
        found = FoundTensors.of(file, tensors)
        settings = {
            HEADER: PeftSettings.of_header(header.get(HEADER), layers.component, f"{HEADER!r} in the header of {file.name}"),
            BESIDE: PeftSettings.of_file(file.parent / BESIDE),
        }
        paths = {layer: layers.find(layer) for layer in found.down}
        strange = next((layer for layer, place in paths.items() if place is None), None)
        scaling = {}
        for layer, down in found.down.items():
            place = paths[layer] or layers.stripped(layer)
            scales = sources(layer, place, len(down), found.alpha.get(layer), settings, layers)
            if not scales and strange is None:
                raise ValueError(
                    f"LoRA.start: {file} does not give the scale of its updates, and names such as {found.down_names[layer].whole!r} do "
                    f"not show it. Put peft's {BESIDE} beside it; or, if alpha is the rank, begin the names with '{layers.component}.', "
                    "as diffusers does."
                )
            scaling[layer] = agreed(layer, scales) if scales else 1.0
        if strange is not None:
            return cls._converted(found, scaling, found.down_names[strange].whole, layers, convert)
        return cls._placed(file, found, {layer: place for layer, place in paths.items() if place is not None}, scaling)

    @classmethod
    def _placed(cls, file: Path, found: "FoundTensors", paths: Mapping[str, str], scaling: Mapping[str, float]) -> "SavedAdapters":
        owners: dict[str, str] = {}
        for layer, path in paths.items():
            if path in owners:
                both = " and ".join(repr(found.down_names[one].whole) for one in (owners[path], layer))
                raise ValueError(f"LoRA.start: {file} has two updates of {path!r}: {both}")
            owners[path] = layer
        down, up = ({path: part[layer] for path, layer in owners.items()} for part in (found.down, found.up))
        return cls(down, up, {path: scaling[layer] for path, layer in owners.items()})

    @classmethod
    def _converted(
        cls, found: "FoundTensors", scaling: Mapping[str, float], strange: str, layers: Layers, convert: Convert | None
    ) -> "SavedAdapters":
        """Convert names by diffusers. Alphas are multiplied in before, so that only pairs of matrices have to be renamed and split."""
        refused = f"LoRA.start: {strange!r} is for no layer of {layers.network}"
        if convert is None:
            raise ValueError(refused)
        pairs = {name.plain: found.down[layer] for layer, name in found.down_names.items()}
        pairs |= {name.plain: found.up[layer].float() * scaling[layer] for layer, name in found.up_names.items()}
        try:
            renamed = convert(pairs)
        except ValueError as error:
            raise ValueError(f"{refused}, and diffusers cannot convert the file ({error}). {_OTHER}") from error
        down: dict[str, Tensor] = {}
        up: dict[str, Tensor] = {}
        for name, tensor in renamed.items():
            parsed = Name.of(name)
            path = layers.find(parsed.layer)
            part = {"down": down, "up": up}.get(parsed.kind or "")
            if path is None or part is None or path in part:
                raise ValueError(f"{refused}; diffusers converts a name to {name!r}, which is for none either. {_OTHER}")
            part[path] = tensor
        if not down or down.keys() != up.keys():
            raise ValueError(f"{refused}, and diffusers' conversion leaves matrices without their pair. {_OTHER}")
        return cls(down, up, dict.fromkeys(down, 1.0))

    @torch.no_grad()
    def fill(self, network: nn.Module, adapter: str, scale: float) -> None:
        """Give a network's adapters the change of weights in the file, times `scale`. Adapters of higher rank keep further ranks to train.

        Raises:
            ValueError: a layer has no adapter, or has another shape.
        """
        modules = dict(network.named_modules())
        for layer, down in self.down.items():
            module: Any = modules.get(layer)
            if module is None or not hasattr(module, "lora_A"):
                raise ValueError(f"LoRA.targets must cover the layers of LoRA.start; {layer!r} of {type(network).__name__} has no adapter")
            mine_down, mine_up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            rank, up = len(down), self.up[layer]
            fits = down.shape[1:] == mine_down.shape[1:] and (len(up), *up.shape[2:]) == (len(mine_up), *mine_up.shape[2:])
            if rank > len(mine_down) or not fits or up.shape[1] != rank:
                largest = max(map(len, self.down.values()))
                raise ValueError(
                    f"LoRA.rank must be at least that of LoRA.start ({largest}), and its layers those of the model; {layer!r} has rank "
                    f"{rank} and is {_size(up, down)}, the adapter has rank {len(mine_down)} and is {_size(mine_up, mine_down)}"
                )
            mine_down[:rank] = down.to(mine_down)
            mine_up.zero_()
            mine_up[:, :rank] = up.to(mine_up) * (scale * self.scaling[layer] / module.scaling[adapter])


def _size(up: Tensor, down: Tensor) -> str:
    return " x ".join(str(side) for side in (len(up), *down.shape[1:]))
