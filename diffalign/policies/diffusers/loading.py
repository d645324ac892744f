"""From a pipeline folder or hub id to its family, found by the class that its model_index.json names."""

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from diffalign.core import HostWeights
from diffalign.embedded import SHAPEWORLD

from .family import Family, Setting
from .mapped import hold, loading_dtype
from .quantization import Quantization, quantize

GROUP = "diffalign.families"
"""The entry point group by which another distribution announces a family: name = "module:Class"."""


@functools.cache
def _imported() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    for entry in importlib.metadata.entry_points(group=GROUP):
        entry.load()


def _concrete(kind: Any) -> Iterator[type[Family]]:
    for subclass in kind.__subclasses__():
        if not inspect.isabstract(subclass):
            yield subclass
        yield from _concrete(subclass)


def families() -> tuple[type[Family], ...]:
    """All that are known: those of this folder, of entry points, and of modules that were imported. A stranger's comes first."""
    _imported()
    return tuple(sorted(_concrete(Family), key=lambda family: family.__module__.startswith("diffalign.")))


@attrs.frozen(eq=False)
class Loaded:
    """A pipeline, taken apart.

    Args:
        family: with text encoders and autoencoder
        network: the denoiser
        folder: where the pipeline lies
    """

    family: Family
    network: Any
    folder: Path


def _named(path: str) -> type[Family]:
    """The family of an import path.

    Raises:
        ValueError: there is no such class, or it is no family.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = vars(importlib.import_module(module))[name]
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(f"family must be the import path of a Family, such as mypackage.MyFamily; got {path!r}: {error!r}") from error
    if not inspect.isclass(found) or not issubclass(found, Family) or inspect.isabstract(found):
        raise ValueError(
            f"family must be the import path of a concrete subclass of Family; {path!r} is none. docs/adapters.md has an example."
        )
    return found


def load_family(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    setting: Setting,
    quantization: Quantization | None = None,
    host: HostWeights | None = None,
    named: str | None = None,
) -> Loaded:
    """Load a pipeline and find its family.

    Args:
        path: folder, hub id, or "shapeworld"
        dtype: of all weights; an autoencoder that overflows in half precision is loaded in float32
        device: of the denoiser, and of the rest unless it is offloaded
        setting: choices of the run
        quantization: of the denoiser's blocks; None keeps them in `dtype`
        host: holds the denoiser's weights until they are spread over processes; None moves it to the device
        named: import path of the family; None finds it by the pipeline's class

    Raises:
        ValueError: no pipeline there, or one of a class that no family serves.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    source = str(SHAPEWORLD / "model") if path == "shapeworld" else path
    try:
        config = DiffusionPipeline.load_config(source)
        name = config["_class_name"]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"policy.path must be a diffusers pipeline folder (with model_index.json), a hub id, or 'shapeworld'; got {path!r}: {error}"
        ) from error
    family = next((family for family in families() if name in family.pipelines), None) if named is None else _named(named)
    if family is None:
        known = ", ".join(sorted({pipeline for family in families() for pipeline in family.pipelines}))
        raise ValueError(
            f"policy.path: {path!r} is a {name}, and no adapter serves that class. Known: {known}. "
            "To add one, write your own adapter: docs/adapters.md."
        )
    folder = Path(source) if Path(source).is_dir() else Path(DiffusionPipeline.download(source))
    absent = {part: None for part in family.optional if (config.get(part) or [None])[0] is None}
    part = family.component
    loaded = dtype if host is None else loading_dtype(folder / part, config[part], dtype)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype={"default": dtype, part: loaded}, **absent)
    if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.float()
    network = getattr(pipeline, part)
    if quantization is not None:  # before it moves: whole weights may not fit the device
        quantize(network, quantization)
    if host is None:
        network.to(device)
    else:
        network = hold(network, loaded, dtype, host)
    made = family(pipeline, setting)
    if host is not None:
        made.placed(device, dtype)
    if not setting.offload:
        made.pipeline.to(device)  # it has all but the denoiser
    made.source, made.folder = path, folder
    return Loaded(made, network, folder)
