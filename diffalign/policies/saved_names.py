"""Names of tensors in files of adapters, and the layer of the denoiser that each name means."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

import attrs
from torch import Tensor, nn

from diffalign.core.words import allowed_word

Kind = Literal["down", "up", "alpha", "magnitude", "beside"]

_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("down", re.compile(r"(?:\.lora_A(?:\.(?P<adapter>[^.]+))?|[._]lora\.down|\.lora_down|(?<=_lora\d)\.down)\.weight$")),
    ("up", re.compile(r"(?:\.lora_B(?:\.(?P<adapter>[^.]+))?|[._]lora\.up|\.lora_up|(?<=_lora\d)\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("magnitude", re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)$")),
    ("beside", re.compile(r"\.(?:(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up)\.)?(?:bias|diff|diff_b)$")),
)
_SPREAD = re.compile(r"^(?:module\.|_orig_mod\.)+")
_TEXT = re.compile(
    r"^(?:base_model\.model\.)?(?:text_encoders?(?:_\d)?\.|text_model\.|lora_te\d?_|te\d?\.|conditioner\.|cond_stage_model\.)"
)
_TEXT_FACTORS = re.compile(r"\.lora_linear_layer(?=\.(?:down|up)\.weight$)")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
PEFT = "base_model.model."


@attrs.frozen
class Name:
    """Name of a tensor, split into its parts.

    Args:
        whole: name in the file
        plain: name without the prefixes of DDP and torch.compile
        layer: name without its end: the layer in the writer's naming
        kind: kind of the tensor: a matrix of an update, its alpha, DoRA's magnitude, or a term that is added to a layer; None if no known
            writer uses such an end
        end: end of the name, by which the two matrices of an update are matched; "" if no known writer uses it
        adapter: name of peft's adapter, if the name holds it
        text: whether the layer belongs to a text encoder
    """

    whole: str
    plain: str
    layer: str
    kind: Kind | None = attrs.field(validator=allowed_word)
    end: str
    adapter: str | None
    text: bool

    @classmethod
    def of(cls, whole: str) -> "Name":
        plain = _SPREAD.sub("", whole).replace("model.diffusion_model.", "diffusion_model.", 1)
        text = _TEXT.match(plain) is not None
        read = _TEXT_FACTORS.sub(".lora", plain) if text else plain
        for kind, end in _KINDS:
            if found := end.search(read):
                return cls(whole, plain, read[: found.start()], kind, found.group(), found.groupdict().get("adapter"), text)
        return cls(whole, plain, read, None, "", None, text)

    def pairs_with(self, up: "Name") -> bool:
        """True if this name of a first matrix and the name `up` of a second one come from the same naming scheme."""
        return self.end.replace("lora_A", "lora_B").replace("down", "up") == up.end


@attrs.frozen
class Layers:
    """Layers of a denoiser, found by every name that can be read.

    Args:
        paths: paths of its linear layers and convolutions
        flat: paths with "_" for each dot, as kohya and ComfyUI write them -> the paths that they may mean
        component: name of the denoiser in its pipeline
        network: class of the denoiser in messages
    """

    paths: frozenset[str]
    flat: Mapping[str, tuple[str, ...]]
    component: str
    network: str

    @classmethod
    def of(cls, network: nn.Module, component: str) -> "Layers":
        paths = frozenset(layer_paths(network))
        flat: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for path in sorted(paths):
            flat[path.replace(".", "_")] += (path,)
        return cls(paths, dict(flat), component, type(network).__name__)

    def find(self, layer: str) -> str | None:
        """Find the path of the layer that a writer calls `layer`; None if the network has none or several such layers."""
        for prefix in _FLAT:
            if layer.startswith(prefix):
                found = self.flat.get(layer.removeprefix(prefix), ())
                return found[0] if len(found) == 1 else None
        for left in self._stripped(layer):
            direct = left.replace(".processor.", ".")
            for path in (left, direct, f"{direct}.0" if direct.endswith(".to_out") else direct):
                if path in self.paths:
                    return path
        return None

    def stripped(self, layer: str) -> str:
        """Remove the prefixes of a writer's name that do not belong to the layer."""
        return list(self._stripped(layer))[-1]

    def states_scale(self, layer: str) -> bool:
        """True if a missing alpha means alpha = rank in this naming scheme. This holds for all schemes except peft's and bare names."""
        return layer.startswith((f"{self.component}.", "diffusion_model.", *_FLAT)) or ".processor." in layer

    def _stripped(self, layer: str) -> Iterable[str]:
        yield layer
        for prefix in (PEFT, f"{self.component}.", "diffusion_model.", PEFT):
            if layer.startswith(prefix):
                layer = layer.removeprefix(prefix)
                yield layer


def layer_paths(network: nn.Module) -> list[str]:
    """Paths of the layers that can be adapted: linear layers and convolutions."""
    return [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def without_effect(name: Name, tensor: Tensor) -> bool:
    """True if ignoring a tensor changes nothing: it adds zeros, or it belongs to a text encoder's update whose `up` is checked itself."""
    if name.kind in ("up", "beside"):
        return not tensor.any()
    return name.text and name.kind in ("down", "alpha")
