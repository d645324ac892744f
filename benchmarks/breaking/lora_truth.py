"""What a file of adapters means: the weights that plain diffusers has with it, and those that a run starts at."""

import copy
import functools
import json
import math
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.subjects.tiny_pipelines import BUILD, built
from diffalign.policies import LoRA
from diffalign.policies.diffusers import Family, Setting, families

from .lora_files import HEADER, Denoiser, LoraFile

RANK = 12
"""Of the run; larger than that of every file."""

DESCRIBING = {
    *("task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "megatron_core"),
    *(
        "lora_dropout",
        "lora_bias",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "qalora_group_size",
        "runtime_config",
    ),
}
"""Settings of peft without a meaning for adapters that exist."""


@attrs.frozen(eq=False)
class World:
    """Tiny random pipeline and its family."""

    name: str
    pipeline: Any
    family: Family
    base: Any
    weights: Mapping[str, Tensor]
    denoiser: Denoiser

    @classmethod
    def of(cls, name: str) -> "World":
        torch.manual_seed(0)
        pipeline = built(BUILD[name])
        kind = next(kind for kind in families() if type(pipeline).__name__ in kind.pipelines)
        base = getattr(pipeline, kind.component)
        layers = {path: module for path, module in base.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        # peft's rank for a grouped convolution must be divisible by its groups
        shapes = {path: tuple(layer.weight.shape) for path, layer in layers.items() if vars(layer).get("groups", 1) == 1}
        family = kind(pipeline, Setting((32, 32)))
        return cls(name, pipeline, family, base, copy.deepcopy(base.state_dict()), Denoiser(name, kind.component, shapes))

    def started(self, file: Path) -> dict[str, Tensor]:
        """Changes of weights at which a run starts.

        Raises:
            ValueError: the file is refused.
        """
        network = copy.deepcopy(self.base)
        LoRA(rank=RANK, alpha=5, start=str(file)).attach(network, self.family.lora_targets, self.family)
        return self._changes(network)

    def plain(self, file: Path) -> "Plain":
        """What plain diffusers makes of the file."""
        texts = [part for name, part in self.pipeline.components.items() if name.startswith("text_encoder") and isinstance(part, nn.Module)]
        try:
            with _in_time():
                self.pipeline.load_lora_weights(str(file))
            changed = any(
                bool(module.get_delta_weight(adapter).any())
                for part in texts
                for module in part.modules()
                for adapter in getattr(module, "lora_A", ())
            )
            return Plain(self._changes(copy.deepcopy(getattr(self.pipeline, self.denoiser.component))), changed)
        except Exception as error:  # diffusers refuses in many ways
            return Plain({}, refused=f"{type(error).__name__}: {error}")
        finally:
            self._unload()

    def _unload(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        network = getattr(self.pipeline, self.denoiser.component)
        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            self.pipeline.unload_lora_weights()
        if hasattr(network, "peft_config"):
            del network.peft_config

    def _changes(self, network: Any) -> dict[str, Tensor]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            network.fuse_lora()
            network.unload_lora()
        changes = {name: weight - self.weights[name] for name, weight in network.state_dict().items()}
        return {name: change for name, change in changes.items() if bool((change.abs() > 1e-7).any())}


@contextmanager
def _in_time(seconds: float = 10.0) -> Iterator[None]:
    """Raise TimeoutError in a block that takes this much processor time: some conversions of diffusers do not end at an alpha below 0."""

    def end(*_: object) -> None:
        raise TimeoutError(f"does not end within {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@attrs.frozen(eq=False)
class Plain:
    """What plain diffusers makes of a file.

    Args:
        changes: of the denoiser's weights
        texts: whether it changes text encoders
        refused: its error, if it refuses
    """

    changes: Mapping[str, Tensor]
    texts: bool = False
    refused: str = ""


world = functools.cache(World.of)


def same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], names: Mapping[str, object] | None = None) -> bool:
    """True if all changes (or those of `names`) are equal up to 1e-5, relative to the largest where it is above 1."""
    wanted = mine.keys() | theirs.keys() if names is None else names
    for name in wanted:
        one = mine.get(name, torch.zeros(()))
        other = theirs.get(name, torch.zeros(()))
        size = max(1.0, float(other.abs().max()))
        if not float((one - other).abs().max()) <= 1e-5 * size:
            return False
    return True


def rewritten(made: LoraFile, file: Path, denoiser: Denoiser) -> LoraFile | None:
    """The same file in diffusers' own form with alphas multiplied in, by rules that share no code with the package; None if it has none."""
    tensors = load_file(file)
    pattern = re.compile(r"^(?P<layer>.+?)(?P<end>\.lora_A(\.[^.]+)?|\.lora_B(\.[^.]+)?|[._]lora\.(down|up)|\.lora_(down|up))\.weight$")
    flat = {path.replace(".", "_"): path for path in denoiser.shapes}
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        plain = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        if plain.startswith(("text_encoder", "lora_te", "te2.", "cond_stage_model.")):
            continue
        found = pattern.match(plain)
        layer = found["layer"] if found else plain.removesuffix(".alpha")
        for prefix in ("base_model.model.", f"{denoiser.component}.", "model.diffusion_model.", "diffusion_model.", "base_model.model."):
            layer = layer.removeprefix(prefix)
        layer = re.sub(r"^(lora_unet_|lora_transformer_|lycoris_)(.*)$", lambda hit: flat.get(hit[2], hit[0]), layer).replace(
            ".processor.", "."
        )
        layer = f"{layer}.0" if f"{layer}.0" in denoiser.shapes and layer not in denoiser.shapes else layer
        if found and layer in denoiser.shapes:
            pairs.setdefault(layer, {})["A" if "A" in found["end"] or "down" in found["end"] else "B"] = tensor.float()
        elif plain.endswith(".alpha") and tensor.numel() == 1:
            alphas[layer] = float(tensor)
        elif tensor.any():
            return None
    if any(len(pair) < 2 for pair in pairs.values()) or not pairs:
        return None
    pairs = {
        layer: {**pair, "B": pair["B"] * (alphas[layer] / len(pair["A"]) if layer in alphas else 1.0)} for layer, pair in pairs.items()
    }
    settings = {} if alphas else _settings(made, denoiser.component)
    settings = {f"{denoiser.component}.{name}": value for name, value in {"target_modules": sorted(pairs), **settings}.items()}
    header = {HEADER: json.dumps(settings)} if len(settings) > 1 else {}
    named = {f"{denoiser.component}.{layer}.lora_{side}.weight": tensor for layer, pair in pairs.items() for side, tensor in pair.items()}
    return LoraFile("rewritten", named, header)


def _settings(made: LoraFile, component: str) -> dict[str, Any]:
    """Settings of peft for the denoiser, without those that only describe, are null, or are off and unknown to peft."""
    from peft import LoraConfig

    values = made.beside
    if HEADER in made.header:
        values = json.loads(made.header[HEADER])
        values = {name.removeprefix(f"{component}."): value for name, value in values.items() if name.startswith(f"{component}.")}
    if not isinstance(values, dict):
        return {}
    known = LoraConfig.__dataclass_fields__.keys() - DESCRIBING
    given = {name: value for name, value in values.items() if value is not None}
    return {name: value for name, value in given.items() if name in known or (value and name not in DESCRIBING)}


def unspread(file: Path, folder: Path) -> Path:
    """The same file in float32, without the prefixes of DDP and torch.compile, and without zeros: biases, differences, text encoders."""
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in load_file(file).items()}
    beside = re.compile(r"^text_encoder|\.(bias|diff|diff_b)$")
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.any() or not beside.search(name)}
    return LoraFile("", {name: tensor.float() for name, tensor in tensors.items()}, _header(file)).write(folder)


def multiplied_in(file: Path, folder: Path) -> Path:
    """The same file with ComfyUI's shorter prefix and without alphas: the second matrix of a layer is multiplied by alpha / rank."""
    tensors = {re.sub(r"^model\.(?=diffusion_model\.)", "", name): tensor for name, tensor in load_file(file).items()}
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        for first, second in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            up, down = f"{layer}.{second}.weight", f"{layer}.{first}.weight"
            if up in tensors and down in tensors:
                tensors[up] = tensors[up] * (tensors.pop(name) / len(tensors[down]))
                break
    return LoraFile("", tensors, _header(file)).write(folder)


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return content.metadata() or {}


def alphas_differ(file: Path) -> bool:
    """True if layers have alphas of their own. Of a UNet's, plain diffusers takes one for all."""
    tensors = load_file(file)
    values = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha") and tensor.numel() == 1}
    return len(values) > 1 or any(math.isnan(value) for value in values)
