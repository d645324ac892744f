"""Heads of stacked linear layers, in the form that the aesthetic predictor and ImageReward publish."""

from torch import Tensor, nn

from diffalign.core import ConfigError

from .weights import fill, locate, read_tensors


def linear_layers(source: str, file: str, where: str) -> nn.Sequential:
    """Load the linear layers of a head from a checkpoint with layers.N.weight and layers.N.bias, in order of N, without dropout."""
    tensors = {name: tensor.float() for name, tensor in read_tensors(locate(source, file, where), where).items()}
    return linear_head({name.removeprefix("layers."): tensor for name, tensor in tensors.items()}, where)


def linear_head(tensors: dict[str, Tensor], where: str) -> nn.Sequential:
    """Build one network from the layers N.weight [out, in] and N.bias [out], in order of N.

    Raises:
        ConfigError: there are other names, the shapes of neighbouring layers do not fit, or there is more than one output.
    """
    numbers = sorted({int(name.partition(".")[0]) for name in tensors if name.partition(".")[0].isdigit()})
    if {f"{number}.{kind}" for number in numbers for kind in ("weight", "bias")} != tensors.keys() or not numbers:
        raise ConfigError(f"{where} must hold layers.N.weight and layers.N.bias; got {', '.join(sorted(tensors)[:4])}")
    shapes = [tuple(tensors[f"{number}.weight"].shape) for number in numbers]
    if any(len(shape) != 2 for shape in shapes) or [a for a, _ in shapes] != [*(b for _, b in shapes[1:]), 1]:
        raise ConfigError(f"{where} must be linear layers that end in one number; got shapes {shapes}")
    layers = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in shapes))
    renamed = {f"{place}.{kind}": tensors[f"{number}.{kind}"] for place, number in enumerate(numbers) for kind in ("weight", "bias")}
    fill(layers, renamed, where)
    return layers.requires_grad_(False)
