"""Quantization of a denoiser's frozen weights to 4 or 8 bits, by bitsandbytes."""

import importlib
from typing import Any, Literal

from torch import nn

Quantization = Literal["nf4", "int8"]

_MARK = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
"""Attribute that peft reads from a network to put adapters on layers of that kind."""


def quantize(network: nn.Module, kind: Quantization) -> None:
    """Replace the linear layers of the network's blocks. Their weights are quantised when the network is moved to its device.

    Layers before and after the blocks (embeddings, input and output projections) are small and keep their precision. diffusers can do the
    same while it reads the files, but only with a GPU.

    Args:
        network: network on the CPU, not trained; its layers compute in its dtype
        kind: "nf4": 4-bit normal floats in blocks of 64 whose scales are quantised too (4.13 bits a weight). "int8": 8 bits with a scale
            per row, for inputs too (LLM.int8 without its threshold)

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the network has no linear layer in a block.

    Reference: Dettmers et al., arXiv:2305.14314 (nf4) and arXiv:2208.07339 (int8).
    """
    try:
        quantized: Any = importlib.import_module("bitsandbytes.nn")
    except ImportError as error:
        raise ImportError(f"quantization {kind!r} needs the package bitsandbytes: pip install 'diffalign[quantized]'") from error
    lists = [name for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    layers = {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and any(name.startswith(f"{place}.") for place in lists)
    }
    if not layers:
        raise ValueError(f"quantization needs linear layers in the blocks of the network; {type(network).__name__} has none")
    for name, layer in layers.items():
        new: Any
        size, weight = (layer.in_features, layer.out_features, False), layer.weight.data
        if kind == "nf4":
            new = quantized.Linear4bit(*size, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
            new.weight = quantized.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
            new.support_avx512bf16_for_cpu = False  # it would repack the weights in the first forward, and backward cannot read these
        else:
            new = quantized.Linear8bitLt(*size, has_fp16_weights=False, device="meta")
            new.weight = quantized.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, new)
    setattr(network, _MARK[kind], True)


def is_quantized(network: nn.Module) -> bool:
    """True if the network, or the network of which it is a fork, was quantised by `quantize`."""
    return any(getattr(network, mark, False) for mark in _MARK.values())
