"""Weights in one file, as their authors, ComfyUI and others keep them, by diffusers' own conversions."""

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

AUTOENCODER = ("first_stage_model.", "vae.")
TEXT_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")
"""Beginnings of the names of other parts in a file that holds more than a denoiser."""

_UNUSED = "Some weights of the model checkpoint were not used"


def require_file(path: str) -> None:
    """Refuse what is no safetensors file on this machine.

    Raises:
        ValueError: it is not.
    """
    if not Path(path).is_file() or Path(path).suffix != ".safetensors":
        raise ValueError(f"single_file must be a safetensors file on this machine; got {path!r}. What lies on a hub is downloaded first.")


def origin(path: str) -> str | None:
    """Hub id of the pipeline that a safetensors file belongs to, by the names and shapes in it; None if diffusers does not know them.

    Raises:
        ValueError: it cannot be read.
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    with _opened(path) as content:
        names = list(content.keys())
        known = {name: torch.empty(content.get_slice(name).get_shape(), device="meta") for name in names}
    kind = infer_diffusers_model_type(known)
    if kind == "v1":  # its answer to what it does not know
        return None
    found: str = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    return found


def has_text_encoders(file: str) -> bool:
    """Check whether it holds more than denoiser and autoencoder."""
    return any(name.startswith(TEXT_ENCODERS) for name in _names(file))


def has_autoencoder(file: str) -> bool:
    """Check whether it holds an autoencoder."""
    return any(name.startswith(AUTOENCODER) for name in _names(file))


def with_file(
    pipeline: type[Any],
    folder: Path,
    index: Mapping[str, Any],
    part: str,
    file: str,
    dtype: torch.dtype,
    variant: str | None,
    absent: Mapping[str, None],
) -> Any:
    """A pipeline whose weights are those of a file, as far as it has them, and a folder's for the rest.

    Args:
        pipeline: its class
        folder: folder of the pipeline, for all that the file does not hold
        index: its model_index.json
        part: name of the denoiser
        file: with the denoiser's weights, and perhaps those of autoencoder and text encoders
        dtype: type of all weights
        variant: variant of the folder's files
        absent: parts that the pipeline goes without

    Raises:
        ValueError: it cannot be read, is for another model, or holds parts that diffusers cannot take from a file.
    """
    from diffusers.loaders.single_file import FromSingleFileMixin

    parts: dict[str, Any] = {part: loaded(index[part], folder, part, file, dtype), **absent}
    if has_autoencoder(file):
        parts["vae"] = loaded(index["vae"], folder, "vae", file, dtype)
    if not has_text_encoders(file):
        return pipeline.from_pretrained(folder, dtype=dtype, variant=variant, **parts)
    if not issubclass(pipeline, FromSingleFileMixin):
        raise ValueError(f"single_file: {file} holds text encoders too, which diffusers cannot take from a file for a {pipeline.__name__}")
    if "vae" not in parts:
        parts["vae"] = _kind(index["vae"]).from_pretrained(folder, subfolder="vae", dtype=dtype, variant=variant)
    with _explained(file, pipeline.__name__):
        return pipeline.from_single_file(file, config=str(folder), dtype=dtype, **parts)


def loaded(kind: Sequence[str], folder: Path, part: str, file: str, dtype: torch.dtype) -> Any:
    """One network, its sizes from a folder and its weights from a file: all of them, and nothing of its own left over.

    Raises:
        ValueError: the file is not for it.
    """
    network_class = _kind(kind)
    name = network_class.__name__
    with _explained(file, name), _unused() as unused:
        network = network_class.from_single_file(file, config=str(folder), subfolder=part, dtype=dtype)
    if unused:
        names = unused[0].rpartition("\n")[2].strip(" []'")
        raise ValueError(f"single_file: {file} holds weights that a {name} of {folder} has no place for: {names[:200]}")
    return network


def _kind(source: Sequence[str]) -> type[Any]:
    library, name = source
    kind: type[Any] = getattr(importlib.import_module(library), name)
    return kind


def _names(file: str) -> list[str]:
    with _opened(file) as content:
        return list(content.keys())


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise ValueError(f"single_file: {file} cannot be read as safetensors: {str(error)[:200]}") from error


@contextmanager
def _explained(file: str, name: str) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:  # of torch, about a weight without numbers
        raise ValueError(f"single_file: {file} lacks weights that a {name} has. Is it for another model?") from error
    except Exception as error:  # conversions fail in many ways: missing names, other shapes, lists that did not become empty
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"single_file: diffusers cannot make a {name} of {file}: {type(error).__name__}: {lines[0][:200]}. Is it for another model?"
        ) from error


@contextmanager
def _unused() -> Iterator[list[str]]:
    """Collects what diffusers says of weights that it left out, which is no error there."""
    logger = logging.getLogger("diffusers.loaders.single_file_model")
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(_UNUSED):
                heard.append(record.getMessage())

    listener, level, passes_on = Listener(), logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = passes_on
