"""Policies over diffusers pipelines."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from diffalign.core import CPS, Condition, HostWeights, Policy, Prompt, Sharding, Size, TransitionKernel, fork_module
from diffalign.core.forking import view_of
from diffalign.placement import placed

from .arithmetic import keep_float32, set_attention
from .call_graphs import CallGraphs
from .choices import Dtype, enable, read_choices, sides
from .compilation import Compilation
from .diffusers import Family, Quantization, Setting, Source, load_family, require_pipeline
from .encodings import Encodings, Texts, encoder_revision
from .left_out import LeftOut, add_nothing, switch
from .lora import ADAPTER, LoRA
from .products import multiplied_in
from .step_grids import require_free_grid
from .text_length import tell_unread


class FlowMatchingPolicy(Policy):
    """Policy made of a diffusers denoiser v_theta(x, sigma, c) and a transition kernel.

    Args:
        network: the denoiser; the tensors that require gradients belong to this policy, forks share the others
        family: conventions of the model family, with text encoders and autoencoder; shared by all forks
        kernel: the step rule
        grid: steps -> sigmas [steps + 1]; None takes the family's own
        own: names of the policy's own tensors, if they do not require gradients
        encodings: cache of encoded texts; None keeps them in memory
        compilation: compilation that was applied to the network and is applied to forks
        host: holds the network's weights until they are sharded; None if they are in place
        compute: type in which float32 weights are multiplied, if this is faster on the device; None takes float32
        attention: name of the attention backend that was set
        graphs: records calls that wait for the host; None records none
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        kernel: TransitionKernel | None = None,
        grid: Callable[[int], Tensor] | None = None,
        own: Collection[str] | None = None,
        encodings: Texts | None = None,
        compilation: Compilation | None = None,
        host: HostWeights | None = None,
        compute: torch.dtype | None = None,
        attention: str | None = None,
        graphs: CallGraphs | None = None,
    ) -> None:
        if grid is not None:
            require_free_grid(family)
        super().__init__(kernel or CPS(), family.latent_shape)
        self.network = network
        self.family = family
        self.grid = grid
        self.own = frozenset(own if own is not None else (n for n, p in network.named_parameters() if p.requires_grad))
        self.encodings: Texts = encodings or Encodings(family)
        self.compilation = compilation
        self.host = host
        self.compute = compute
        self.attention = attention
        self.graphs = graphs
        self._recorded = None if graphs is None else graphs.of(network)
        self._left_out: LeftOut | None = None

    require_found = staticmethod(require_pipeline)

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
        resolution: int | Sequence[int] | None = None,
        guidance: float | None = None,
        checkpointing: bool = False,
        compilation: Compilation | None = None,
        graphs: CallGraphs | None = None,
        attention: str | None = None,
        offload: bool = False,
        slicing: bool = False,
        tiling: bool = False,
        cache: str | None = None,
        quantization: Quantization | None = None,
        compute: Literal["bfloat16"] | None = None,
        family: str | None = None,
        sharding: Sharding | None = None,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        single_file: str | None = None,
        trainable: bool = True,
    ) -> "FlowMatchingPolicy":
        """Load a pipeline folder or hub id. The family is read from its model_index.json.

        Args:
            path: folder or hub id, or "shapeworld" for the embedded pipeline
            lora: adapters to train; None trains all weights of the denoiser
            kernel: the step rule; CPS by default
            grid: noise grid; the pipeline's scheduler by default
            dtype: type of the frozen base; adapters are float32, and without `lora` it must be float32. On a GPU, "float32" turns TF32 off
                in the convolutions of the process, which makes UNets slower, unless torch.set_float32_matmul_precision allows TF32
            device: "auto" takes an accelerator if there is one
            max_sequence_length: number of text tokens, if the family has this choice; None takes diffusers' default
            resolution: side in pixels, or [height, width]; None takes the model's own
            guidance: guidance input of guidance-distilled networks (FLUX.1-dev); None takes the pipeline's default. For classifier-free
                guidance, wrap the policy in Guided instead
            checkpointing: recompute activations in the backward pass: less memory, a third more time
            compilation: torch.compile, for forks too
            graphs: on a CUDA device, records calls that wait for the host and replays them, for forks too; `{}` with defaults
            attention: diffusers' name of an attention backend, for all networks of the process. None lets torch choose, but on a GPU never
                cuDNN's kernel, whose backward pass has known faults; "native" lets torch choose among all; "_native_cudnn" takes only
                cuDNN's. Backends of other packages ("flash", ...) work for FLUX, Z-Image and Qwen-Image
            offload: text encoders and autoencoder are on the device only while they work
            slicing: decode one image after the other
            tiling: decode large images in tiles
            cache: folder that keeps encoded texts for further runs
            quantization: "nf4" or "int8" keeps the frozen blocks of the denoiser in 4 or 8 bits (extra `quantized`). They compute in
                `dtype` (int8: inputs are rounded to float16 and 8 bits). It needs `lora`; the adapters stay float32
            compute: "bfloat16" is mixed precision: weights, gradients and optimizer stay float32, and the denoiser's matrix products are in
                bfloat16 (torch.autocast). It is for full fine-tuning; with adapters, `dtype` saves more. A CPU without units for bfloat16
                (AMX, AVX512-BF16) computes in float32, which is faster there, and prints a line; so a run that is resumed on another CPU
                may continue with other numbers
            family: import path of a model family of your own (docs/adapters.md); None finds it by the pipeline's class
            sharding: the same object that the loop gets. Until the loop shards the denoiser, it stays in the host's memory and cannot be
                evaluated; so it is never whole on a device
            variant: variant of the weights' files, such as "fp16"
            revision: branch, tag or commit of a hub id
            subfolder: folder of the pipeline inside `path` or the hub's repository
            single_file: safetensors file whose weights replace the pipeline's, as authors, ComfyUI and others publish them:
                the denoiser alone, or with autoencoder and text encoders. `path` then gives all that the file does not hold
            trainable: whether its adapters, or without `lora` its weights, require gradients; a teacher's must not. Trainable forks of a
                frozen policy train its adapters

        Raises:
            ImportError: `quantization` is given, but its extra is not installed.
            ValueError: the pipeline class is unknown, files are missing or are not those that the model needs, the device does not exist,
                the family does not have a setting, or half-precision or quantised weights would be trained.
        """
        lora, dtype = read_choices(lora, dtype, quantization, compute, trainable)
        place = placed(device)
        setting = Setting(sides(resolution), max_sequence_length, guidance, offload)
        host = None if sharding is None or quantization is not None else sharding.host
        source = Source(path, variant, revision, subfolder, single_file)
        loaded = load_family(source, getattr(torch, dtype), place, setting, quantization, host, family)
        adapter, network = loaded.family, loaded.network
        for wanted, verb in ((slicing, "slicing"), (tiling, "tiling")):
            if wanted:
                enable(adapter, verb)
        network.eval()
        set_attention(network, attention, place)
        if dtype == "float32" and compute is None:
            keep_float32(place)
        if lora is not None:
            with nullcontext() if host is None else host.posing():  # peft rounds new adapters to the type of the base
                lora.attach(network, adapter.lora_targets, adapter)
        else:
            network.requires_grad_(trainable)
        if checkpointing:
            network.enable_gradient_checkpointing()
        if compilation is not None:
            compilation.apply(network)
        encodings = None if cache is None else Encodings(adapter, Path(cache), encoder_revision(loaded.folder, loaded.encoders, variant))
        multiplied = None if compute is None else getattr(torch, compute)
        policy = cls(network, adapter, kernel, grid, None, encodings, compilation, host, multiplied, attention, graphs)
        return policy if trainable else policy.requires_grad_(False)  # its own tensors are known by now, so that forks have them

    def require(self, prompts: Sequence[Prompt]) -> None:
        tell_unread(self.family, prompts)

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        tensors = self.encodings.of([str(prompt) for prompt in prompts], self.device)
        return Condition(tuple(prompts), torch.arange(len(prompts)), tensors)

    def encode_negative(self, text: str) -> Condition:
        tell_unread(self.family, [text], "negative prompts")
        return Condition((Prompt(text),), torch.arange(1), self.encodings.of([text], self.device, negative=True))

    def decode(self, latents: Tensor) -> Tensor:
        return self.family.decode(latents)

    def prior(self, noise: Tensor) -> Tensor:
        return self.family.prior(noise.to(self.device))

    def sigmas(self, steps: int) -> Tensor:
        return self.family.sigmas(steps) if self.grid is None else self.grid(steps)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        if self._waits():
            raise RuntimeError(
                "the denoiser's weights wait in the host's memory to be sharded over processes. Give the AlignmentLoop the same "
                "`sharding`, or load the policy without it."
            )
        self.counter.add(len(latents))
        bare = self._left_out is not None and self._left_out.holds()  # else they are on from here
        compute = multiplied_in(self.compute, latents.device)
        plain = compute is None or latents.is_meta  # torch has no autocast there; who counts operators casts (`costs.mixed`)

        def computed(latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
            with nullcontext() if plain else torch.autocast(latents.device.type, compute):
                velocity = self.family.velocity(self.network, latents, sigma, tensors)
            return velocity.to(latents.dtype)

        if self._recorded is None:
            return computed(latents, sigma, condition.tensors)
        return self._recorded(computed, (self.family.size, compute, bare, self.network.training), latents, sigma, condition.tensors)

    def sized(self, size: Size | None) -> Policy:
        if size is None or size == self.family.size:
            return self
        family = self.family.sized(size)
        return view_of(self, family=family, latent_shape=family.latent_shape)

    @property
    def no_guidance(self) -> float:
        return self.family.no_guidance

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return self.family.guide(positive, negative, scale)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        if pristine and not self.adapters:
            raise ValueError(
                "fork(pristine=True) needs LoRA adapters to leave out; this policy trains all its weights. Fork it before training."
            )
        own = (parameter for name, parameter in self.network.named_parameters() if name in self.own)
        lent = {} if self.host is None else self.host.lend(own)
        network = fork_module(self.network, self.own, trainable=trainable, lent=lent)
        left_out = None
        if self._left_out is not None:
            switch(network, on=True)  # the copy's are off like these
        if pristine or (self._left_out is not None and self._left_out.holds()):
            parameters = dict(network.named_parameters())
            left_out = LeftOut.of(network, [parameters[name] for name in self.adapters], trained=trainable)
        if self.compilation is not None:
            self.compilation.apply(network)
        chosen = (self.encodings, self.compilation, self.host, self.compute, self.attention, self.graphs)
        twin = type(self)(network, self.family, self.kernel, self.grid, self.own, *chosen)
        twin._left_out = left_out
        self.shares_tensors = twin.shares_tensors = True
        return twin

    @property
    def without_delta(self) -> bool:
        return add_nothing(self.network, self.adapters)

    @property
    def device(self) -> torch.device:
        return self.family.device if self._waits() else super().device

    @property
    def precision(self) -> torch.dtype:
        return multiplied_in(self.compute, self.device) or super().precision

    @property
    def reproducible(self) -> bool:
        return self.compilation is None

    def _waits(self) -> bool:
        return self.host is not None and self.host.holds(self.network)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the own tensors to which the LoRA update is proportional; empty if all weights are trained."""
        return tuple(sorted(name for name in self.own if "lora_B" in name))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {f"network.{name}": parameter for name, parameter in self.network.named_parameters() if name in self.own}

    def save_lora(self, folder: str) -> None:
        """Write the adapters with their alpha for `pipeline.load_lora_weights(folder)` of plain diffusers.

        Raises:
            ValueError: the policy has no adapters.
        """
        if not self.adapters:
            raise ValueError("save_lora needs LoRA adapters; this policy trains all its weights. Save the whole pipeline instead.")
        from peft import get_peft_model_state_dict

        network: Any = self.network
        component = self.family.component
        adapters = get_peft_model_state_dict(network, adapter_name=ADAPTER)
        weights = {
            f"{component}_lora_layers": {name: tensor.cpu() for name, tensor in adapters.items()},
            f"{component}_lora_adapter_metadata": network.peft_config[ADAPTER].to_dict(),  # it holds the alpha
        }
        type(self.family.pipeline).save_lora_weights(folder, safe_serialization=True, **weights)
