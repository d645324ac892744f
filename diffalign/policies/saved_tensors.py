"""Tensors of a file of adapters. Each tensor is used or refused."""

from collections.abc import Mapping
from pathlib import Path

import attrs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .saved_names import Name, without_effect
from .saved_scales import MERGE

FILE = "pytorch_lora_weights.safetensors"
"""Name of the file that diffusers writes into a folder."""
PEFT_FILE = "adapter_model.safetensors"

_LONGEST = 300
"""Letters of a name. Messages hold several."""
_NAMED = "the tensors of a file must be named by layer, as pipeline.save_lora_weights and peft name them"


@attrs.frozen(eq=False)
class FoundTensors:
    """Tensors of the denoiser in a file, by the writer's name of the layer."""

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    alpha: Mapping[str, float]
    down_names: Mapping[str, Name]
    up_names: Mapping[str, Name]

    @classmethod
    def of(cls, file: Path, tensors: Mapping[str, Tensor]) -> "FoundTensors":
        """Split a file into the parts of its updates. Nothing is ignored, except zeros that would be added.

        Raises:
            ValueError: a tensor is of another kind or has no second matrix; the message names the first such tensor.
        """
        parts: dict[str, dict[str, tuple[Name, Tensor]]] = {"down": {}, "up": {}, "alpha": {}}
        adapters = set()
        if long := next((whole for whole in tensors if len(whole) > _LONGEST), None):
            raise ValueError(
                f"LoRA.start: names of tensors must have at most {_LONGEST} letters, as layers have; one of {file} has {len(long)} "
                f"({long[:80]!r}...)"
            )
        if not any("." in whole for whole in tensors):
            first = next(iter(tensors), "nothing")
            raise ValueError(f"LoRA.start: {_NAMED}, down and up for each; {file} holds {len(tensors)} tensors (first: {first!r})")
        for whole, tensor in tensors.items():
            name = Name.of(whole)
            _require_read(file, name, tensor)
            if name.text or name.kind == "beside" or name.kind is None:
                continue
            if name.layer in parts[name.kind]:
                raise ValueError(f"LoRA.start: {file} has two tensors for one place: {parts[name.kind][name.layer][0].whole!r}, {whole!r}")
            parts[name.kind][name.layer] = (name, tensor)
            adapters |= {name.adapter} if name.kind != "alpha" else set()
        if len(adapters) > 1:
            raise ValueError(
                f"LoRA.start: {file} holds several adapters, {', '.join(sorted(map(str, adapters)))}; save the one to start at"
            )
        _require_pairs(file, tensors, parts)
        return cls(
            {layer: tensor for layer, (_, tensor) in parts["down"].items()},
            {layer: tensor for layer, (_, tensor) in parts["up"].items()},
            {layer: float(tensor) for layer, (_, tensor) in parts["alpha"].items()},
            {layer: name for layer, (name, _) in parts["down"].items()},
            {layer: name for layer, (name, _) in parts["up"].items()},
        )


def _require_read(file: Path, name: Name, tensor: Tensor) -> None:
    """Refuse a tensor with an effect that is no low-rank update of the denoiser."""
    where = f"LoRA.start: {name.whole!r} in {file}"
    if not tensor.is_floating_point() and name.kind != "alpha":
        raise ValueError(f"{where} has type {tensor.dtype}, which is not supported. {MERGE}")
    if not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{where} holds numbers that are not finite")
    if name.kind is None:
        raise ValueError(f"{where} is not understood: no matrix of a low-rank update. {MERGE}")
    if name.text and not without_effect(name, tensor):
        raise ValueError(
            f"{where} is for a text encoder, which is not trained here: it would change the input of the denoiser. Remove these tensors "
            f"if only those of the denoiser are wanted. {MERGE}"
        )
    if name.kind == "magnitude":
        raise ValueError(f"{where} belongs to DoRA, whose change of weights has no low rank. {MERGE}")
    if name.kind == "beside" and not without_effect(name, tensor):
        raise ValueError(f"{where} is added to a layer beside its low-rank update, which an adapter here cannot do. {MERGE}")


def _require_pairs(file: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, tuple[Name, Tensor]]]) -> None:
    """Refuse a matrix without its second matrix, wrong shapes, and alphas that only some layers have."""
    down, up, alpha = parts["down"], parts["up"], parts["alpha"]
    if not down and not up:
        raise ValueError(
            f"LoRA.start: {file} must hold an update of the denoiser; none of its {len(tensors)} tensors is one "
            f"(first: {next(iter(tensors))!r})"
        )
    for mine, others in ((down, up), (up, down), (alpha, down)):
        if alone := next((name.whole for layer, (name, _) in mine.items() if layer not in others), None):
            raise ValueError(f"LoRA.start: {alone!r} in {file} has no partner: a layer needs two matrices, down and up")
    for layer, (name, tensor) in down.items():
        partner, other = up[layer]
        if not name.pairs_with(partner):
            raise ValueError(f"LoRA.start: {name.whole!r} and {partner.whole!r} in {file} are no pair: they follow two naming schemes")
        if tensor.ndim < 2 or tensor.ndim != other.ndim or len(tensor) < 1 or other.shape[1] != len(tensor):
            raise ValueError(
                f"LoRA.start: {name.whole!r} in {file} must be [rank, in] and its pair [out, rank]; they are {list(tensor.shape)} and "
                f"{list(other.shape)}"
            )
    if alpha and (lacking := next((name.whole for layer, (name, _) in down.items() if layer not in alpha), None)):
        raise ValueError(f"LoRA.start: {file} has an alpha for some layers, but none for that of {lacking!r}, so its scale is not known")
    for name, tensor in alpha.values():
        if tensor.numel() != 1:
            raise ValueError(f"LoRA.start: {name.whole!r} in {file} must be one number; it is {list(tensor.shape)}")


def file_of(path: str) -> Path:
    """Find the safetensors file of a path.

    Raises:
        ValueError: there is no file, or it is no safetensors file.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        file = place
    else:
        lone = sorted(place.glob("*.safetensors"))
        known = [place / name for name in (FILE, PEFT_FILE) if (place / name).exists()]
        if len(known) > 1:
            raise ValueError(f"LoRA.start: {path} holds both {FILE} and {PEFT_FILE}; name the file to start at")
        file = known[0] if known else lone[0] if len(lone) == 1 else place / FILE
    if not file.is_file():
        raise ValueError(
            f"LoRA.start must be a safetensors file, or a folder with {FILE} or {PEFT_FILE}; got {path!r}, where there is none. "
            "Download files of a hub first: `hf download NAME`, which prints the folder."
        )
    if file.suffix.lower() != ".safetensors":
        raise ValueError(
            f"LoRA.start: {_NAMED}; {file.name} is no safetensors file. A positional list, such as the EMA of a training state, does "
            "not say which layer a tensor is for: load it with the code that wrote it, and save it by name."
        )
    return file


def content_of(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read all tensors of a file, and the texts of its header.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"LoRA.start: {file} cannot be read as safetensors: {str(error)[:200]}") from error
