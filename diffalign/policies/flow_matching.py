"""Flow-matching policies over diffusers pipelines."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Self

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import CPS, Condition, Policy, Prompt, TransitionKernel, fork_module

from .diffusers import Family, load_family

Dtype = Literal["float32", "bfloat16", "float16"]


@attrs.frozen
class LoRA:
    """Low-rank adapters on the denoiser, through peft. Dropout is not offered: replay could not be exact.

    Args:
        rank: of the update
        alpha: the update is scaled by alpha / rank
        targets: names (suffixes) of the linear layers; None takes the family's usual ones
        init: "zero" starts at the base exactly (B = 0); "gaussian" likewise, with a Gaussian A

    Reference: Hu et al., arXiv:2106.09685.
    """

    rank: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    alpha: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    targets: Sequence[str] | None = None
    init: Literal["zero", "gaussian"] = "gaussian"

    def attach(self, network: Any, default_targets: Sequence[str]) -> None:
        """Freeze `network` and add the adapters, in float32."""
        from peft import LoraConfig

        network.requires_grad_(False)
        targets = list(default_targets if self.targets is None else self.targets)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=targets, init_lora_weights=True if self.init == "zero" else "gaussian"
        )
        try:
            network.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"LoRA.targets must name linear layers of {type(network).__name__}; got {targets}: {error}") from error
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


class FlowMatchingPolicy(Policy):
    """A diffusers denoiser as a policy: v_theta(x, sigma, c) under a transition kernel.

    Args:
        network: the denoiser; the tensors that require gradients are this policy's own, forks share the others
        family: the conventions of its model family, with text encoders and autoencoder, shared by all forks
        kernel: the step rule
        grid: steps -> sigmas [steps + 1]; None takes the family's own
        own: names of the own tensors, where they do not require gradients
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        kernel: TransitionKernel | None = None,
        grid: Callable[[int], Tensor] | None = None,
        own: Collection[str] | None = None,
    ) -> None:
        super().__init__(kernel or CPS(), family.latent_shape)
        self.network = network
        self.family = family
        self.grid = grid
        self.own = frozenset(own if own is not None else (n for n, p in network.named_parameters() if p.requires_grad))
        self._encodings: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        lora: LoRA | None = None,
        kernel: TransitionKernel | None = None,
        grid: Callable[[int], Tensor] | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        max_sequence_length: int | None = None,
    ) -> "FlowMatchingPolicy":
        """Load a pipeline folder or hub id; the family is read from its own model_index.json.

        Args:
            path: folder or hub id, or "shapeworld" for the embedded pipeline
            lora: adapters to train; None trains all weights of the denoiser
            kernel: the step rule; CPS by default
            grid: noise grid; the pipeline's scheduler by default
            dtype: of the frozen base; adapters are float32, and without `lora` it must be float32
            device: "auto" takes an accelerator where there is one
            max_sequence_length: text tokens, where the family has such a choice; None is diffusers' default

        Raises:
            ValueError: an unknown pipeline class, missing files, or half-precision weights that would be trained.
        """
        if lora is None and dtype != "float32":
            raise ValueError(
                f"dtype must be float32 when all weights are trained (an optimizer loses small steps in {dtype}); or give lora"
            )
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        family, network = load_family(path, getattr(torch, dtype), place, max_sequence_length)
        network.eval()
        if lora is not None:
            lora.attach(network, family.lora_targets)
        else:
            network.requires_grad_(True)
        return cls(network, family, kernel, grid)

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        missing = [text for text in dict.fromkeys(map(str, prompts)) if text not in self._encodings]
        if missing:
            encoded = self.family.encode(missing)
            for index, text in enumerate(missing):
                self._encodings[text] = {name: tensor[index] for name, tensor in encoded.items()}
        rows = [self._encodings[str(prompt)] for prompt in prompts]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Condition(tuple(prompts), torch.arange(len(prompts)), tensors)

    def decode(self, latents: Tensor) -> Tensor:
        return self.family.decode(latents)

    def prior(self, noise: Tensor) -> Tensor:
        return noise.to(self.device)

    def sigmas(self, steps: int) -> Tensor:
        return self.family.sigmas(steps) if self.grid is None else self.grid(steps)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.counter.add(len(latents))
        return self.family.velocity(self.network, latents, sigma, condition.tensors).to(latents.dtype)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return self.family.guide(positive, negative, scale)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        if pristine and not self.adapters:
            raise ValueError(
                "fork(pristine=True) needs LoRA adapters to leave out; this policy trains all its weights. Fork it before training."
            )
        network = fork_module(self.network, self.own, trainable=trainable)
        if pristine:
            parameters = dict(network.named_parameters())
            for name in self.adapters:
                torch.nn.init.zeros_(parameters[name])
        twin = type(self)(network, self.family, self.kernel, self.grid, self.own)
        twin._encodings = self._encodings
        self.shares_tensors = twin.shares_tensors = True
        return twin

    @property
    def adapters(self) -> tuple[str, ...]:
        """The own tensors that a LoRA delta is proportional to; none where all weights are trained."""
        return tuple(sorted(name for name in self.own if "lora_B" in name))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {f"network.{name}": parameter for name, parameter in self.network.named_parameters() if name in self.own}

    def save_lora(self, folder: str) -> None:
        """Write the adapters as `pipeline.load_lora_weights(folder)` of plain diffusers reads them, alpha included.

        Raises:
            ValueError: there are none.
        """
        if not self.adapters:
            raise ValueError("save_lora needs LoRA adapters; this policy trains all its weights. Save the whole pipeline instead.")
        self.family.save_lora(self.network, folder)
