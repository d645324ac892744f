"""Scale of the updates in a file of adapters, from peft's settings, which diffusers writes into the header."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from .saved_names import Layers

HEADER = "lora_adapter_metadata"
BESIDE = "adapter_config.json"

_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_DESCRIBING = {
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the names of the tensors show this
    *("lora_dropout", "lora_bias"),  # used only in training; biases are tensors, which are checked
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_SAFE = {"peft_type": ("LORA", None), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
"""Initialisations that keep the base. Others (PiSSA, OLoRA, LoftQ, ...) change the base, so their adapters fit only the changed base."""


@attrs.frozen
class PeftSettings:
    """Settings of peft for one denoiser.

    Args:
        values: settings by name
        source: place of the settings in messages
    """

    values: Mapping[str, Any]
    source: str

    @classmethod
    def of_header(cls, text: str | None, component: str, source: str) -> "PeftSettings | None":
        """Read the denoiser's settings from a header, where each setting names its component; None if the header has none."""
        if text is None:
            return None
        values = _mapping(text, source)
        own = {name.removeprefix(f"{component}."): value for name, value in values.items() if name.startswith(f"{component}.")}
        if not own:
            found = next(iter(values), "nothing")
            raise ValueError(f"LoRA.start: {source} must hold settings of the {component}, but it has none (first: {found[:80]!r})")
        return cls.checked(own, source)

    @classmethod
    def of_file(cls, file: Path) -> "PeftSettings | None":
        """Read the settings from peft's configuration file; None if there is none."""
        if not file.exists():
            return None
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"LoRA.start: {file} cannot be read: {error}") from error
        return cls.checked(_mapping(text, str(file)), str(file))

    @classmethod
    def checked(cls, values: Mapping[str, Any], source: str) -> "PeftSettings":
        """Refuse a setting that changes the meaning of the tensors in a way that is not supported."""
        from peft import LoraConfig

        usual = vars(LoraConfig())
        for name, value in values.items():
            if name in _READ or name in _DESCRIBING:
                continue
            fine = value in _SAFE[name] if name in _SAFE else not value or (name in usual and usual[name] == value)
            if not fine:
                raise ValueError(
                    f"LoRA.start: the setting {name[:80]!r} = {str(value)[:80]!r} in {source} is not understood, and may change what the "
                    f"tensors mean. {MERGE}"
                )
        for name in ("rank_pattern", "alpha_pattern"):
            _require(isinstance(values.get(name) or {}, Mapping), name, values.get(name), source)
        numbers = {name: values[name] for name in ("r", "lora_alpha") if name in values}
        numbers |= {f"{name}.{key}": value for name in ("rank_pattern", "alpha_pattern") for key, value in (values.get(name) or {}).items()}
        for name, value in numbers.items():
            fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            _require(fine, name, value, source)
        _require("lora_alpha" in values, "lora_alpha", None, source)
        _require(isinstance(values.get("use_rslora", False), bool), "use_rslora", values.get("use_rslora"), source)
        return cls(values, source)

    def scale(self, layer: str, rank: int) -> float:
        """Factor of the product of a layer's matrices.

        Raises:
            ValueError: the settings give another rank.
        """
        from peft import LoraConfig

        stated = self._of(layer, "rank_pattern", self.values.get("r", LoraConfig().r))
        if stated != rank:
            meant = "" if "r" in self.values else " (peft's, because it does not state r)"
            raise ValueError(
                f"LoRA.start: {layer!r} has rank {rank}, but rank {stated} in {self.source}{meant}; the file and its settings differ"
            )
        alpha = self._of(layer, "alpha_pattern", self.values["lora_alpha"])
        return float(alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank)

    def _of(self, layer: str, patterns: str, usual: Any) -> Any:
        for pattern, value in (self.values.get(patterns) or {}).items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", layer)  # as peft matches
            except (re.error, RecursionError, OverflowError) as error:  # nested too deeply, a repetition too often
                raise ValueError(
                    f"LoRA.start: {patterns!r} in {self.source} holds {pattern[:80]!r}, which is no pattern: {error}"
                ) from error
            if found:
                return value
        return usual


MERGE = (
    "To start from it anyway: load the file with the program that wrote it, merge it into the base (in plain diffusers "
    "`pipeline.fuse_lora()`, `unload_lora_weights()`, `save_pretrained(...)`), and start from that pipeline."
)


def agreed(layer: str, scales: Mapping[str, float]) -> float:
    """Scale on which all sources agree.

    Raises:
        ValueError: two of them differ.
    """
    (first, scale), *others = scales.items()
    for source, other in others:
        if not math.isclose(scale, other, rel_tol=1e-4, abs_tol=1e-12):
            raise ValueError(
                f"LoRA.start: the update of {layer!r} must be multiplied by {scale:g} according to {first}, but by {other:g} according to "
                f"{source}; remove the wrong one"
            )
    return scale


def sources(
    layer: str, path: str, rank: int, alpha: float | None, settings: Mapping[str, PeftSettings | None], layers: Layers
) -> dict[str, float]:
    """Scale of a layer according to each source that gives one.

    Args:
        layer: writer's name of the layer
        path: path of the layer in the denoiser, or the writer's name without prefixes
        rank: rank of its matrices
        alpha: value of its own alpha tensor, if it has one
        settings: settings by name of the source
        layers: layers of the denoiser
    """
    scales = {} if alpha is None else {"its alpha": alpha / rank}
    header = settings.get(HEADER)
    if header is not None:
        scales[header.source] = header.scale(path, rank)
    if not scales and layers.states_scale(layer):
        scales["the usual alpha = rank of such names"] = 1.0
    beside = settings.get(BESIDE)
    if beside is not None:
        scales[beside.source] = beside.scale(path, rank)
    return scales


def _require(fine: bool, name: str, value: Any, source: str) -> None:
    if not fine:
        raise ValueError(f"LoRA.start: the setting {name[:80]!r} in {source} must have a value that peft allows; got {str(value)[:80]!r}")


def _mapping(text: str, source: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"LoRA.start: {source} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"LoRA.start: {source} must hold peft's settings by name; got {str(values)[:80]!r}")
    return values
