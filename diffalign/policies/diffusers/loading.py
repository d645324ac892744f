"""Loading of a pipeline folder or hub id. The family is found by the class that its model_index.json names."""

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

from .family import Family, Setting
from .mapped import hold, loading_dtype
from .quantization import Quantization, quantize
from .single_file import has_text_encoders, with_file
from .source import Source, require_weights

GROUP = "diffalign.families"
"""Entry point group by which another distribution announces a family: name = "module:Class"."""


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
    """All known families: those of this folder, of entry points, and of imported modules. Families of others come first."""
    _imported()
    return tuple(sorted(_concrete(Family), key=lambda family: family.__module__.startswith("diffalign.")))


@attrs.frozen(eq=False)
class Loaded:
    """Pipeline that was split into its family and its denoiser.

    Args:
        family: family, with text encoders and autoencoder
        network: the denoiser
        folder: folder of the pipeline
        encoders: file that the text encoders' weights were taken from, if not the folder's; None if there is none
    """

    family: Family
    network: Any
    folder: Path
    encoders: Path | None = None


def _named(path: str) -> type[Family]:
    """Import a family by its path.

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


def _without_notes() -> Any:
    """Import diffusers without progress bars, and without notes on image processors that want torchvision, which no pipeline here needs."""
    import diffusers
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        importlib.import_module("diffusers.loaders.ip_adapter")  # names the image processors; all pipelines import it
    finally:
        transformers_logging.set_verbosity(verbosity)
    return diffusers


def load_family(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    setting: Setting,
    quantization: Quantization | None = None,
    host: HostWeights | None = None,
    named: str | None = None,
) -> Loaded:
    """Load a pipeline and find its family.

    Args:
        source: files to load
        dtype: type of all weights; an autoencoder that overflows in half precision is loaded in float32
        device: device of the denoiser, and of the rest unless it is offloaded
        setting: settings of the run
        quantization: quantization of the denoiser's blocks; None keeps them in `dtype`
        host: holds the denoiser's weights until they are sharded; None moves the denoiser to the device
        named: import path of the family; None finds it by the pipeline's class

    Raises:
        ValueError: there is no pipeline, no family serves its class, or the weights do not fit it.
    """
    diffusers = _without_notes()
    config = source.index()
    name = config["_class_name"]
    family = next((family for family in families() if name in family.pipelines), None) if named is None else _named(named)
    if family is None:
        known = ", ".join(sorted({pipeline for family in families() for pipeline in family.pipelines}))
        raise ValueError(
            f"policy.path: {source.path!r} is a {name}, and no adapter serves that class. Known: {known}. "
            "To add one, write your own adapter: docs/adapters.md."
        )
    folder = source.fetched()
    absent = {part: None for part in family.optional if (config.get(part) or [None])[0] is None}
    part = family.component
    loaded = dtype
    if source.single_file is not None:
        pipeline = with_file(getattr(diffusers, name), folder, config, part, source.single_file, dtype, source.variant, absent)
    else:
        require_weights(folder, [each for each, kind in config.items() if isinstance(kind, list) and kind[0]], source.variant)
        loaded = dtype if host is None else loading_dtype(folder / part, config[part], dtype, source.variant)
        types = {"default": dtype, part: loaded}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=types, variant=source.variant, **absent)
    if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.float()
    network = getattr(pipeline, part)
    if quantization is not None:  # before the denoiser is moved, because unquantised weights may not fit the device
        quantize(network, quantization)
    if host is None:
        network.to(device)
    else:
        network = hold(network, loaded, dtype, host)
    made = family(pipeline, setting)
    if host is not None:
        made.placed(device, dtype)
    if not setting.offload:
        made.pipeline.to(device)  # the pipeline has no denoiser any more
    made.source, made.folder, made.loaded_from = source.path, folder, source
    file = source.single_file
    return Loaded(made, network, folder, Path(file) if file is not None and has_text_encoders(file) else None)
