"""Files of adapters, as their writers lay them out, for random layers of a tiny denoiser."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

HEADER = "lora_adapter_metadata"


@attrs.define
class LoraFile:
    """File of adapters before it is written.

    Args:
        writer: program that lays files out like this
        tensors: by name
        header: texts in the header of the file
        beside: peft's settings, which stand in a file of their own; None if there is none
        mark: the reason for which such a file is refused; "" if it is read
    """

    writer: str
    tensors: dict[str, Tensor]
    header: dict[str, str] = attrs.field(factory=dict)
    beside: Any = None
    mark: str = ""

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "lora.safetensors"
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, file, {"format": "pt", **self.header})
        config = folder / "adapter_config.json"
        config.unlink(missing_ok=True)
        if self.beside is not None:
            config.write_text(self.beside if isinstance(self.beside, str) else json.dumps(self.beside))
        return file


@attrs.frozen(eq=False)
class Denoiser:
    """Layers of a denoiser that a file may adapt.

    Args:
        family: name of the tiny pipeline
        component: name of the denoiser in its pipeline
        shapes: shape of the weight of each layer, by its path
    """

    family: str
    component: str
    shapes: Mapping[str, Sequence[int]]

    def some(self, chance: random.Random, most: int = 3) -> list[str]:
        return chance.sample(sorted(self.shapes), chance.randint(1, most))

    def pair(self, chance: random.Random, path: str, rank: int, pieces: int = 1) -> tuple[Tensor, Tensor]:
        """Random matrices for a layer, or for one that is `pieces` such layers in one."""
        numbers = torch.Generator().manual_seed(chance.randrange(2**31))
        out, *into = self.shapes[path]
        ones = (1,) * (len(into) - 1)
        down = 0.3 * torch.randn(rank, *into, generator=numbers)
        return down, 0.3 * torch.randn(pieces * out, rank, *ones, generator=numbers)


Writer = Callable[[Denoiser, random.Random], LoraFile]


def _settings(chance: random.Random, paths: Sequence[str], rank: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings of peft, and the rank of each layer by them."""
    from peft import LoraConfig

    ends = [path.rsplit(".", 1)[-1] for path in paths]
    settings: dict[str, Any] = {"r": rank, "lora_alpha": chance.choice((1, 4, 7, 16)), "target_modules": sorted(paths)}
    if chance.random() < 0.4:
        settings["use_rslora"] = True
    if chance.random() < 0.4:
        settings["rank_pattern"] = {chance.choice([chance.choice(paths), chance.choice(ends)]): chance.choice((1, 3, 6))}
    if chance.random() < 0.4:
        settings["alpha_pattern"] = {chance.choice([chance.choice(paths), chance.choice(ends)]): chance.choice((1, 2, 9))}
    config = LoraConfig(**settings).to_dict()
    plain = json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    (pattern, other) = next(iter((settings.get("rank_pattern") or {"": rank}).items()))
    ranks = {path: other if pattern and (path == pattern or path.endswith(f".{pattern}")) else rank for path in paths}
    return plain, ranks


def diffusers(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    paths = denoiser.some(chance)
    settings, ranks = _settings(chance, paths, chance.randint(1, 5))
    tensors = _pairs(denoiser, chance, {f"{denoiser.component}.{path}": path for path in paths}, ranks)
    header = {} if chance.random() < 0.2 else {HEADER: json.dumps({f"{denoiser.component}.{k}": v for k, v in settings.items()})}
    return LoraFile("diffusers", tensors, header)


def dora(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    made = diffusers(denoiser, chance)
    name = chance.choice([each for each in made.tensors if ".lora_B." in each])
    up = made.tensors[name]
    made.tensors[
        name.replace(".lora_B.weight", chance.choice((".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")))
    ] = torch.rand(len(up)) + 0.5
    made.writer, made.mark = "DoRA", "DoRA"
    return made


def biased(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    made = diffusers(denoiser, chance)
    name = chance.choice([each for each in made.tensors if ".lora_B." in each])
    made.tensors[name.replace(".weight", ".bias")] = torch.randn(len(made.tensors[name]))
    made.writer, made.mark = "peft with lora_bias", "bias"
    return made


def with_text(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    made = chance.choice((diffusers, kohya))(denoiser, chance)
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    zero = chance.random() < 0.5
    up = torch.zeros(16, 2) if zero else torch.randn(16, 2)
    if made.writer == "kohya":
        stem = f"lora_te_{path.replace('.', '_')}" if denoiser.family == "sd15" else f"lora_te1_{path.replace('.', '_')}"
        made.tensors |= {f"{stem}.lora_down.weight": torch.randn(2, 16), f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    else:
        made.tensors |= {f"text_encoder.{path}.lora_A.weight": torch.randn(2, 16), f"text_encoder.{path}.lora_B.weight": up}
    made.writer += " with a text encoder" + (" of zeros" if zero else "")
    made.mark = "" if zero else "text encoder"
    return made


def peft(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    paths = denoiser.some(chance)
    settings, ranks = _settings(chance, paths, chance.randint(1, 5))
    return LoraFile("peft", _pairs(denoiser, chance, {f"base_model.model.{path}": path for path in paths}, ranks), beside=settings)


def bare(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    paths = denoiser.some(chance)
    settings, ranks = _settings(chance, paths, chance.randint(1, 5))
    tensors = _pairs(denoiser, chance, {path: path for path in paths}, ranks)
    return LoraFile("bare paths beside a configuration", tensors, beside=settings)


def kohya(denoiser: Denoiser, chance: random.Random, prefix: str = "lora_unet_") -> LoraFile:
    paths = denoiser.some(chance)
    ranks = {path: chance.randint(1, 5) for path in paths}
    names = {f"{prefix}{path.replace('.', '_')}": path for path in paths}
    tensors = _pairs(denoiser, chance, names, ranks, (".lora_down", ".lora_up"))
    alpha = float(chance.choice((1, 4, 16)))
    tensors |= {f"{name}.alpha": torch.tensor(alpha if chance.random() < 0.8 else alpha / 2) for name in names}
    header = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": str(alpha)}
    return LoraFile("kohya", tensors, header if chance.random() < 0.5 else {})


def onetrainer(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    made = kohya(denoiser, chance, "lora_transformer_")
    made.writer = "OneTrainer"
    return made


def lycoris(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    made = kohya(denoiser, chance, "lycoris_")
    made.writer = "LyCORIS"
    return made


def comfyui(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    """ai-toolkit and ComfyUI: dotted names, with alphas or without."""
    paths = denoiser.some(chance)
    prefix = chance.choice(("diffusion_model.", "model.diffusion_model."))
    names = {f"{prefix}{path}": path for path in paths}
    ends = chance.choice(((".lora_A", ".lora_B"), (".lora_down", ".lora_up")))
    tensors = _pairs(denoiser, chance, names, {path: chance.randint(1, 5) for path in paths}, ends)
    if chance.random() < 0.5:
        tensors |= {f"{name}.alpha": torch.tensor(float(chance.choice((1, 4, 16)))) for name in names}
    return LoraFile("ai-toolkit, ComfyUI", tensors)


def processors(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    """Attention processors of diffusers before peft."""
    found = [path for path in sorted(denoiser.shapes) if re.search(r"\.attn\d?\.to_[qkv]$", path)]
    paths = chance.sample(found, min(len(found), chance.randint(1, 3)))
    names = {f"{denoiser.component}.{path.rsplit('.', 1)[0]}.processor.{path.rsplit('.', 1)[1]}": path for path in paths}
    tensors = _pairs(denoiser, chance, names, {path: chance.randint(1, 5) for path in paths}, ("_lora.down", "_lora.up"))
    return LoraFile("attention processors", tensors)


FUSED = {
    "flux-dev": {
        "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn.to_q", 3),
        "double_blocks.0.txt_attn.qkv": ("transformer_blocks.0.attn.to_q", 3),
        "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj", 1),
        "single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out", 1),
    },
    "flux2-klein": {
        "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn.to_q", 3),
        "single_blocks.0.linear1": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", 1),
    },
    "z-image": {"layers.0.attention.qkv": ("layers.0.attention.to_q", 3)},
}
"""Layers under their authors' names -> a layer of diffusers with the same shape, and how many of it they are."""


def authors(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    layers = FUSED[denoiser.family]
    flat = chance.random() < 0.5 or denoiser.family == "z-image"
    chosen = chance.sample(sorted(layers), chance.randint(1, len(layers)))
    rank, tensors = chance.randint(1, 4), {}
    # diffusers converts dotted names of FLUX and FLUX.2 by the ends of one writer each
    ends = (".lora_down", ".lora_up") if flat or denoiser.family == "flux-dev" else (".lora_A", ".lora_B")
    for name in chosen:
        path, pieces = layers[name]
        written = f"lora_unet_{name.replace('.', '_')}" if flat else f"diffusion_model.{name}"
        down, up = denoiser.pair(chance, path, rank, pieces)
        tensors |= {f"{written}{ends[0]}.weight": down, f"{written}{ends[1]}.weight": up}
        if flat or chance.random() < 0.5:
            tensors[f"{written}.alpha"] = torch.tensor(float(chance.choice((1, 2, 8))))
    if len({name.endswith(".alpha") for name in tensors}) > 1 and sum(name.endswith(".alpha") for name in tensors) < len(chosen):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    return LoraFile("layers under their authors' names", tensors)


def xlabs(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    tensors, rank = {}, chance.randint(1, 4)
    for end, pieces in (("qkv_lora1", 3), ("proj_lora2", 1)):
        down, up = denoiser.pair(chance, "transformer_blocks.0.attn.to_q", rank, pieces)
        tensors |= {f"double_blocks.0.processor.{end}.down.weight": down, f"double_blocks.0.processor.{end}.up.weight": up}
    return LoraFile("XLabs", tensors)


def other_methods(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    """LoHa, LoKr, (IA)^3, full differences: no low-rank updates."""
    (path,) = denoiser.some(chance, 1)
    stem, (out, *into) = f"lycoris_{path.replace('.', '_')}", denoiser.shapes[path]
    kinds = {
        "LoHa": {f"{stem}.hada_w{n}_{side}": torch.randn(*((out, 2) if side == "a" else (2, into[0]))) for n in (1, 2) for side in "ab"},
        "LoKr": {f"{stem}.lokr_w1": torch.randn(2, 2), f"{stem}.lokr_w2": torch.randn(out // 2, into[0])},
        "full": {f"{stem}.diff": torch.randn(out, *into)},
        "ia3": {f"{stem}.weight": torch.randn(out), f"{stem}.on_input": torch.tensor(False)},
        "glora": {f"{stem}.{end}.weight": torch.randn(2, 2) for end in ("a1", "a2", "b1", "b2")},
    }
    kind = chance.choice(sorted(kinds))
    tensors = kinds[kind] | {f"{stem}.alpha": torch.tensor(1.0)}
    if chance.random() < 0.5:
        tensors |= kohya(denoiser, chance).tensors
    return LoraFile(f"LyCORIS {kind}", tensors, mark="no low-rank update")


def _pairs(
    denoiser: Denoiser,
    chance: random.Random,
    names: Mapping[str, str],
    ranks: Mapping[str, int],
    ends: tuple[str, str] = (".lora_A", ".lora_B"),
) -> dict[str, Tensor]:
    tensors = {}
    for name, path in names.items():
        down, up = denoiser.pair(chance, path, ranks[path])
        tensors |= {f"{name}{ends[0]}.weight": down, f"{name}{ends[1]}.weight": up}
    return tensors


COMMON: tuple[Writer, ...] = (diffusers, peft, bare, kohya, onetrainer, lycoris, comfyui, with_text, dora, biased, other_methods)
ALSO: Mapping[str, tuple[Writer, ...]] = {
    "flux-dev": (authors, xlabs),
    "flux2-klein": (authors,),
    "z-image": (authors,),
    "sd15": (processors,),
    "sdxl": (processors,),
}


def written_by_somebody(denoiser: Denoiser, chance: random.Random) -> LoraFile:
    return chance.choice((*COMMON, *2 * ALSO.get(denoiser.family, ())))(denoiser, chance)
