"""Weights of tiny diffusers networks under the names that the models' authors gave them."""

import torch


def z_image(transformer):
    """As the authors and ComfyUI name them: query, key and value in one piece."""
    tensors = dict(transformer.state_dict())
    for name in [name for name in tensors if name.endswith(".attention.to_q.weight")]:
        pieces = [tensors.pop(name.replace("to_q", f"to_{letter}")) for letter in "qkv"]
        tensors[name.replace("to_q", "qkv")] = torch.cat(pieces)
    renamed = {}
    for name, tensor in tensors.items():
        new = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
        new = (
            new.replace(".to_out.0.", ".out.")
            .replace("attention.norm_q", "attention.q_norm")
            .replace("attention.norm_k", "attention.k_norm")
        )
        renamed[new] = tensor.clone()
    return renamed


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"conv_shortcut": "skip_connection"}


def latent_diffusion(pipeline):
    """A Stable Diffusion 1.5 as its first release: UNet, autoencoder and text encoder in one file."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _autoencoder(pipeline.vae).items()}
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def _unet(unet):
    """diffusers counts blocks and layers, the authors count inputs and outputs."""
    layers, places = unet.config.layers_per_block, {}
    for block in range(len(unet.down_blocks)):
        for layer in range(layers):
            number = 1 + block * (layers + 1) + layer
            places[f"down_blocks.{block}.resnets.{layer}."] = f"input_blocks.{number}.0."
            places[f"down_blocks.{block}.attentions.{layer}."] = f"input_blocks.{number}.1."
        places[f"down_blocks.{block}.downsamplers.0.conv."] = f"input_blocks.{(block + 1) * (layers + 1)}.0.op."
    for block, module in enumerate(unet.up_blocks):
        for layer in range(layers + 1):
            number = block * (layers + 1) + layer
            places[f"up_blocks.{block}.resnets.{layer}."] = f"output_blocks.{number}.0."
            places[f"up_blocks.{block}.attentions.{layer}."] = f"output_blocks.{number}.1."
        last = 2 if getattr(module, "attentions", None) else 1
        places[f"up_blocks.{block}.upsamplers.0.conv."] = f"output_blocks.{(block + 1) * (layers + 1) - 1}.{last}.conv."
    places |= {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    places |= {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    places |= {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    return {_renamed(name, places, RESNET): tensor for name, tensor in unet.state_dict().items()}


def _autoencoder(vae):
    places = {}
    count = len(vae.decoder.up_blocks)
    for block in range(count):
        for layer in range(vae.config.layers_per_block + 1):
            places[f"encoder.down_blocks.{block}.resnets.{layer}."] = f"encoder.down.{block}.block.{layer}."
            places[f"decoder.up_blocks.{block}.resnets.{layer}."] = f"decoder.up.{count - 1 - block}.block.{layer}."
        places[f"encoder.down_blocks.{block}.downsamplers.0."] = f"encoder.down.{block}.downsample."
        places[f"decoder.up_blocks.{block}.upsamplers.0."] = f"decoder.up.{count - 1 - block}.upsample."
    for side in ("encoder", "decoder"):
        places |= {f"{side}.mid_block.resnets.{place}.": f"{side}.mid.block_{place + 1}." for place in (0, 1)}
        places |= {f"{side}.mid_block.attentions.0.": f"{side}.mid.attn_1.", f"{side}.conv_norm_out.": f"{side}.norm_out."}
    layers = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, tensor in vae.state_dict().items():
        attention = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        renamed[_renamed(name, places, layers)] = tensor[..., None, None] if attention else tensor
    return renamed


def _renamed(name, places, layers):
    old = next((old for old in places if name.startswith(old)), None)
    if old is None:
        return name
    rest = name.removeprefix(old)
    layer = next((layer for layer in layers if rest.startswith(f"{layer}.")), None)
    return places[old] + (rest if layer is None else layers[layer] + rest.removeprefix(layer))
