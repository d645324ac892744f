"""The tensors of a file of adapters, each accounted for."""

from collections.abc import Mapping
from pathlib import Path

import attrs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .saved_names import Name, without_effect
from .saved_scales import MERGE

FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it in a folder."""
PEFT_FILE = "adapter_model.safetensors"

_NAMED = "the tensors of a file must be named by layer, as pipeline.save_lora_weights and peft name them"


@attrs.frozen(eq=False)
class Found:
    """The tensors of the denoiser in a file, by layer as the writer calls it."""

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    alpha: Mapping[str, float]
    down_names: Mapping[str, Name]
    up_names: Mapping[str, Name]

    @classmethod
    def of(cls, file: Path, tensors: Mapping[str, Tensor]) -> "Found":
        """Take a file apart; nothing is passed over but zeros that would be added.

        Raises:
            ValueError: naming the first tensor that is something else, or has no other half.
        """
        parts: dict[str, dict[str, tuple[Name, Tensor]]] = {"down": {}, "up": {}, "alpha": {}}
        adapters = set()
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
    """Refuse a tensor that has an effect which a low-rank update of the denoiser does not have."""
    where = f"LoRA.start: {name.whole!r} in {file}"
    if not tensor.is_floating_point() and name.kind != "alpha":
        raise ValueError(f"{where} is of type {tensor.dtype}, which is not understood. {MERGE}")
    if not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{where} holds numbers that are not finite")
    if name.kind is None:
        raise ValueError(f"{where} is not understood: no matrix of a low-rank update. {MERGE}")
    if name.text and not without_effect(name, tensor):
        raise ValueError(
            f"{where} is for a text encoder: it would change what the denoiser is given, and is not trained here. Leave those tensors "
            f"out if the denoiser's are meant alone. {MERGE}"
        )
    if name.kind == "magnitude":
        raise ValueError(f"{where} is of DoRA, whose change of weights is of no low rank. {MERGE}")
    if name.kind == "beside" and not without_effect(name, tensor):
        raise ValueError(f"{where} is added to a layer besides its update, which an adapter here cannot. {MERGE}")


def _require_pairs(file: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, tuple[Name, Tensor]]]) -> None:
    """Refuse a matrix without its other half, other shapes, and alphas that some layers have and others lack."""
    down, up, alpha = parts["down"], parts["up"], parts["alpha"]
    if not down and not up:
        raise ValueError(
            f"LoRA.start: {file} holds {len(tensors)} tensors (first: {next(iter(tensors))!r}), and none of an update of the denoiser"
        )
    for mine, others in ((down, up), (up, down), (alpha, down)):
        if alone := next((name.whole for layer, (name, _) in mine.items() if layer not in others), None):
            raise ValueError(f"LoRA.start: {alone!r} in {file} stands alone: a layer has two matrices, down and up")
    for layer, (name, tensor) in down.items():
        partner, other = up[layer]
        if not name.pairs_with(partner):
            raise ValueError(f"LoRA.start: {name.whole!r} and {partner.whole!r} in {file} are no pair: two writers name matrices so")
        if tensor.ndim < 2 or tensor.ndim != other.ndim or len(tensor) < 1 or other.shape[1] != len(tensor):
            raise ValueError(
                f"LoRA.start: {name.whole!r} in {file} must be [rank, in] and its pair [out, rank]; they are {list(tensor.shape)} and "
                f"{list(other.shape)}"
            )
    if alpha and (lacking := next((name.whole for layer, (name, _) in down.items() if layer not in alpha), None)):
        raise ValueError(f"LoRA.start: {file} has an alpha for some layers and none for that of {lacking!r}, which leaves its scale open")
    for name, tensor in alpha.values():
        if tensor.numel() != 1:
            raise ValueError(f"LoRA.start: {name.whole!r} in {file} must be one number; it is {list(tensor.shape)}")


def file_of(path: str) -> Path:
    """The file that a path means.

    Raises:
        ValueError: there is none, or no safetensors file.
    """
    place = Path(path)
    if not place.is_dir():
        file = place
    else:
        lone = sorted(place.glob("*.safetensors"))
        known = [place / name for name in (FILE, PEFT_FILE) if (place / name).exists()]
        file = known[0] if known else lone[0] if len(lone) == 1 else place / FILE
    if not file.is_file():
        raise ValueError(
            f"LoRA.start must be a safetensors file, or a folder with {FILE} or {PEFT_FILE}; got {path!r}, where there is none. "
            "What lies on a hub is downloaded first: `hf download NAME`, which prints the folder."
        )
    if file.suffix != ".safetensors":
        raise ValueError(
            f"LoRA.start: {_NAMED}; {file.name} is no safetensors file. A positional list, such as the EMA of a training state, does "
            "not say which layer a tensor is for: load it with the code that wrote it, and save it by name."
        )
    return file


def content_of(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """All tensors of a file, and its header's texts.

    Raises:
        ValueError: it is broken.
    """
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"LoRA.start: {file} cannot be read as safetensors: {str(error)[:200]}") from error
