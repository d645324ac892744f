"""Adapters that exist already, as the start of a run: a few-step student, or somebody's LoRA."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from safetensors import safe_open
from torch import Tensor, nn

FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it in a folder."""

_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|unet\.)?(?:base_model\.model\.)?")
_DOWN = re.compile(r"\.(?:lora_A(?:\.\w+)?|lora\.down|lora_down)\.weight$")
_UP = re.compile(r"\.(?:lora_B(?:\.\w+)?|lora\.up|lora_up)\.weight$")


@attrs.frozen(eq=False)
class SavedAdapters:
    """The low-rank layers of a file, by path of the layer in the denoiser.

    Args:
        down: each [rank, in]
        up: each [out, rank]
        scaling: alpha / rank of each
    """

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    scaling: Mapping[str, float]

    @classmethod
    def read(cls, path: str) -> "SavedAdapters":
        """Read what diffusers or peft wrote.

        Args:
            path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`

        Raises:
            ValueError: no such file, or one whose tensors do not say for which layers they are.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise ValueError(f"LoRA.start must be a safetensors file, or a folder with {FILE}; got {path!r}, where there is none")
        names = "the tensors of a file must be named by layer, as pipeline.save_lora_weights and peft name them"
        if file.suffix != ".safetensors":
            raise ValueError(
                f"LoRA.start: {names}; {file.name} is no safetensors file. A positional list, such as the EMA of a training state, does "
                "not say which layer a tensor is for: load it with the code that wrote it, and save it by name."
            )
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  no mapping
            metadata = content.metadata() or {}
        down = {_path(name, _DOWN): tensor for name, tensor in tensors.items() if _DOWN.search(name)}
        up = {_path(name, _UP): tensor for name, tensor in tensors.items() if _UP.search(name)}
        if not down or down.keys() != up.keys():
            first = next(iter(tensors), "nothing")
            raise ValueError(f"LoRA.start: {names}, down and up for each; {file} holds {len(tensors)} tensors (first: {first!r})")
        alphas = {_PREFIX.sub("", name).removesuffix(".alpha"): float(t) for name, t in tensors.items() if name.endswith(".alpha")}
        usual = _alpha(metadata, file)
        scaling = {layer: alphas.get(layer, usual or len(tensor)) / len(tensor) for layer, tensor in down.items()}
        return cls(down, up, scaling)

    @torch.no_grad()
    def fill(self, network: nn.Module, adapter: str, scale: float) -> None:
        """Give a network's adapters the change of weights that the file holds, times `scale`. More ranks than the file has stay free.

        Raises:
            ValueError: a layer without adapter, or of another shape.
        """
        modules = dict(network.named_modules())
        for layer, down in self.down.items():
            module = modules.get(layer)
            if module is None or not hasattr(module, "lora_A"):
                raise ValueError(f"LoRA.targets must cover the layers of LoRA.start; {layer!r} of {type(network).__name__} has no adapter")
            mine_down, mine_up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            rank, up = len(down), self.up[layer]
            if rank > len(mine_down) or down.shape[1] != mine_down.shape[1] or len(up) != len(mine_up):
                raise ValueError(
                    f"LoRA.rank must be at least that of LoRA.start, and its layers those of the model; {layer!r} has rank {rank} and is "
                    f"{len(up)} x {down.shape[1]}, the adapter has rank {len(mine_down)} and is {len(mine_up)} x {mine_down.shape[1]}"
                )
            mine_down[:rank] = down.to(mine_down)
            mine_up.zero_()
            mine_up[:, :rank] = up.to(mine_up) * (scale * self.scaling[layer] / module.scaling[adapter])


def _path(name: str, end: re.Pattern[str]) -> str:
    return _PREFIX.sub("", end.sub("", name))


def _alpha(metadata: Mapping[str, str], file: Path) -> float | None:
    """The alpha of all layers, where the file or peft's own configuration beside it names one."""
    about = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    named = [value for key, value in about.items() if key.rpartition(".")[2] == "lora_alpha"]
    beside = file.parent / "adapter_config.json"
    if not named and beside.exists():
        named = [json.loads(beside.read_text())["lora_alpha"]]
    return float(named[0]) if named else None
