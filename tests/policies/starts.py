"""Files of adapters as their writers name the tensors, and what plain diffusers makes of them."""

import copy
import json

import torch
from safetensors.torch import save_file
from tiny_pipelines import BUILD, built

from diffalign.core import Euler, Prompt
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.diffusers import Setting, families

LENGTH = {"sd15": None, "sdxl": None, "qwen-image": 256}


class World:
    """A tiny pipeline with the velocity of any denoiser in the place of its own."""

    def __init__(self, name):
        self.pipeline = built(BUILD[name])
        kind = next(kind for kind in families() if type(self.pipeline).__name__ in kind.pipelines)
        self.family = kind(self.pipeline, Setting((32, 32), LENGTH.get(name, 24)))
        self.component = kind.component
        self.base = getattr(self.pipeline, self.component).eval()
        policy = self.policy(self.base)
        self.condition = policy.encode([Prompt("a"), Prompt("b")])
        self.latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        self.plain = self.velocity(self.base)

    def policy(self, network):
        return FlowMatchingPolicy(network, self.family, Euler())

    @torch.no_grad()
    def velocity(self, network):
        return self.policy(network).velocity(self.latents, torch.tensor([0.9, 0.3]), self.condition)

    def network(self, **lora):
        network = copy.deepcopy(self.base)
        LoRA(**lora).attach(network, self.family.lora_targets, self.family)
        return network

    def start(self, file, **lora):
        """The velocity at which a run begins."""
        return self.velocity(self.network(start=str(file), **{"rank": 12, "alpha": 3, **lora}))

    def elsewhere(self, file):
        """The velocity of plain diffusers with the file."""
        try:
            self.pipeline.load_lora_weights(str(file))
            return self.velocity(getattr(self.pipeline, self.component))
        finally:
            self.pipeline.unload_lora_weights()

    def with_peft(self, **config):
        """A denoiser that peft adapts, with random weights."""
        from peft import LoraConfig

        network = copy.deepcopy(self.base).requires_grad_(False)
        network.add_adapter(LoraConfig(**config))
        return randomized(network)

    def saved(self, network, folder, *, metadata=True, **more):
        """As plain diffusers saves the adapters of a denoiser."""
        from peft import get_peft_model_state_dict

        layers = {f"{self.component}_lora_layers": get_peft_model_state_dict(network)}
        if metadata:
            layers[f"{self.component}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
        type(self.pipeline).save_lora_weights(str(folder), **layers, **more)
        return folder / "pytorch_lora_weights.safetensors"

    def pairs(self, layers, rank=4, between=(".lora_A", ".lora_B"), rows=1, alpha=None):
        """Random matrices for layers: name in the file -> path in the denoiser, whose shape it has, `rows` times as high."""
        modules, tensors = dict(self.base.named_modules()), {}
        for seed, (name, path) in enumerate(layers.items()):
            weight, generator = modules[path].weight, torch.Generator().manual_seed(seed)
            ones = (1,) * (weight.ndim - 2)
            tensors[f"{name}{between[0]}.weight"] = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
            tensors[f"{name}{between[1]}.weight"] = 0.3 * torch.randn(rows * len(weight), rank, *ones, generator=generator)
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        return tensors


@torch.no_grad()
def randomized(network):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


KOHYA = (".lora_down", ".lora_up")


def written(folder, tensors, settings=None):
    """A file, with peft's settings in its header as diffusers writes them."""
    metadata = {"format": "pt"} | ({} if settings is None else {"lora_adapter_metadata": json.dumps(settings)})
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def kohya(world, *paths, **options):
    return world.pairs({f"lora_unet_{path.replace('.', '_')}": path for path in paths}, between=KOHYA, **options)


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
WRITERS = {
    "kohya, SD 1.5": ("sd15", lambda w: kohya(w, f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.0.proj", alpha=2)),
    "LoCon, SD 1.5": ("sd15", lambda w: kohya(w, "down_blocks.0.resnets.0.conv1", f"{BLOCK}.attn1.to_k", alpha=1)),
    "kohya, SDXL by its authors' names": (
        "sdxl",
        lambda w: w.pairs(
            {
                "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q": f"{BLOCK}.attn1.to_q",
                "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
                "lora_unet_output_blocks_0_1_proj_in": "up_blocks.0.attentions.0.proj_in",
            },
            between=KOHYA,
            alpha=1,
        ),
    ),
    "attention processors": (
        "sd15",
        lambda w: w.pairs(
            {
                f"unet.{BLOCK}.attn1.processor.to_q": f"{BLOCK}.attn1.to_q",
                f"unet.{BLOCK}.attn1.processor.to_out": f"{BLOCK}.attn1.to_out.0",
            },
            between=("_lora.down", "_lora.up"),
        ),
    ),
    "kohya, FLUX by its authors' names": (
        "flux-dev",
        lambda w: {
            **w.pairs({"lora_unet_double_blocks_0_img_attn_qkv": "transformer_blocks.0.attn.to_q"}, 6, KOHYA, rows=3, alpha=2),
            **w.pairs(
                {
                    "lora_unet_double_blocks_0_txt_mlp_0": "transformer_blocks.0.ff_context.net.0.proj",
                    "lora_unet_single_blocks_0_linear2": "single_transformer_blocks.0.proj_out",
                },
                between=KOHYA,
                alpha=8,
            ),
        },
    ),
    "ComfyUI, FLUX by its authors' names": (
        "flux-dev",
        lambda w: w.pairs({"diffusion_model.double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.to_q"}, 4, KOHYA, 3, alpha=2),
    ),
    "XLabs, FLUX": (
        "flux-dev",
        lambda w: {
            **w.pairs({"double_blocks.0.processor.qkv_lora1": "transformer_blocks.0.attn.to_q"}, between=(".down", ".up"), rows=3),
            **w.pairs({"double_blocks.0.processor.proj_lora2": "transformer_blocks.0.attn.to_q"}, between=(".down", ".up")),
        },
    ),
    "OneTrainer, FLUX": (
        "flux-dev",
        lambda w: w.pairs({"lora_transformer_transformer_blocks_0_attn_to_q": "transformer_blocks.0.attn.to_q"}, 4, KOHYA, alpha=2),
    ),
    "alphas, FLUX": (
        "flux-dev",
        lambda w: w.pairs({"transformer.proj_out": "proj_out", "transformer.x_embedder": "x_embedder"}, alpha=3),
    ),
    "ai-toolkit, FLUX.2": (
        "flux2-klein",
        lambda w: {
            **w.pairs({"diffusion_model.double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.to_q"}, rows=3),
            **w.pairs({"diffusion_model.single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj"}),
        },
    ),
    "kohya, FLUX.2": (
        "flux2-klein",
        lambda w: w.pairs({"lora_unet_double_blocks_0_img_attn_qkv": "transformer_blocks.0.attn.to_q"}, 4, KOHYA, 3, alpha=1),
    ),
    "ai-toolkit, Z-Image": ("z-image", lambda w: w.pairs({"diffusion_model.layers.0.attention.to_q": "layers.0.attention.to_q"})),
    "kohya, Z-Image by its authors' names": (
        "z-image",
        lambda w: w.pairs({"lora_unet_layers_0_attention_qkv": "layers.0.attention.to_q"}, 4, KOHYA, 3, alpha=2),
    ),
    "ai-toolkit, Qwen-Image": (
        "qwen-image",
        lambda w: w.pairs({"diffusion_model.transformer_blocks.0.attn.to_q": "transformer_blocks.0.attn.to_q"}),
    ),
    "kohya, Qwen-Image": ("qwen-image", lambda w: kohya(w, "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", alpha=2)),
    "default adapter, Qwen-Image": (
        "qwen-image",
        lambda w: w.pairs(
            {"transformer_blocks.0.attn.to_q": "transformer_blocks.0.attn.to_q"}, 4, (".lora_A.default", ".lora_B.default"), alpha=4
        ),
    ),
    "diffusers, Sana": ("sana", lambda w: w.pairs({"transformer.transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1.to_q"})),
}
"""A writer -> a family of tiny pipelines, and the tensors of a file."""
