"""How writers of adapters name their tensors, and which layer of a denoiser each name is for."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

import attrs
from torch import Tensor, nn

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
    """The name of a tensor, taken apart.

    Args:
        whole: as the file has it
        plain: without what DDP and torch.compile put before it
        layer: what is left of it without its end: the layer, as its writer calls it
        kind: the matrices of an update, its alpha, DoRA's magnitude, what is added to a layer besides, or None where no writer is known
            that ends a name so
        end: the end, which names a matrix as the other half of the update names its own, or "" where no writer is known
        adapter: of peft, where the name says it
        text: whether the layer is one of a text encoder
    """

    whole: str
    plain: str
    layer: str
    kind: Kind | None
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
        """Whether the writer of this name of a first matrix names the second one so."""
        return self.end.replace("lora_A", "lora_B").replace("down", "up") == up.end


@attrs.frozen
class Layers:
    """The layers of a denoiser by every name that is read.

    Args:
        paths: of its linear layers and convolutions
        flat: the same with "_" for each dot, as kohya and ComfyUI write them, to what they may stand for
        component: name of the denoiser in its pipeline
        network: class of the denoiser, for messages
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
        """The path of the layer that a writer calls `layer`; None where it is none of the network, or one of several."""
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
        """The writer's name without the prefixes that say nothing about the layer."""
        return list(self._stripped(layer))[-1]

    def states_scale(self, layer: str) -> bool:
        """Whether a writer that names layers so leaves the alpha out only where it is the rank: all but peft and bare names."""
        return layer.startswith((f"{self.component}.", "diffusion_model.", *_FLAT)) or ".processor." in layer

    def _stripped(self, layer: str) -> Iterable[str]:
        yield layer
        for prefix in (PEFT, f"{self.component}.", "diffusion_model.", PEFT):
            if layer.startswith(prefix):
                layer = layer.removeprefix(prefix)
                yield layer


def layer_paths(network: nn.Module) -> list[str]:
    """Paths of the layers that can be adapted: linear ones and convolutions."""
    return [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def without_effect(name: Name, tensor: Tensor) -> bool:
    """Whether a tensor that is not read changes nothing: zeros that would be added, or half of an update whose other half is asked too."""
    if name.kind in ("up", "beside"):
        return not tensor.any()
    return name.text and name.kind in ("down", "alpha")
