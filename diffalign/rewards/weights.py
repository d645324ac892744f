"""Search for weights in a local folder or on the hub; a failure gives one sentence that says what is wrong."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.core import ConfigError
from diffalign.core.hub import is_within_reach, unreached


def every(*loads: Callable[[], Any]) -> tuple[Any, ...]:
    """Call functions that load one thing each.

    Raises:
        ConfigError: files of some are missing; the message names those of all.
    """
    loaded: list[Any] = []
    missing: list[str] = []
    for load in loads:
        try:
            loaded.append(load())
        except ConfigError as error:
            missing.append(str(error))
    if missing:
        raise ConfigError(" And ".join(missing))
    return tuple(loaded)


def pretrained(load: Callable[..., Any], source: str, where: str, **options: Any) -> Any:
    """Call `from_pretrained` for a local folder or a hub id.

    Args:
        load: method from_pretrained of a transformers class
        source: folder or hub id
        where: Class.field for the message
        options: further arguments of `load`

    Raises:
        ConfigError: there is no such folder and no such hub id within reach, or its files do not fit the class.
    """
    here = {} if is_within_reach() else {"local_files_only": True}
    try:
        return load(source, **options, **here)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where} must be a local folder that save_pretrained wrote, or a hub id within reach; got {source!r}: "
            f"{unreached(source, error)}"
        ) from error


def locate(source: str, file: str, where: str) -> Path:
    """Find the path of a weights file.

    Args:
        source: the file itself, a local folder that holds `file`, or a hub id
        file: name of the file in the folder or on the hub
        where: Class.field for the message

    Raises:
        ConfigError: it is in none of these places.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise ConfigError(f"{where} must be a folder that holds {file}; {source!r} does not")
        return path / file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, file, local_files_only=not is_within_reach()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where} must be a file, a folder that holds {file}, or a hub id within reach; got {source!r}: {unreached(source, error)}"
        ) from error


def read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or a torch checkpoint by name; of an entry "state_dict" or "model" if there is one.

    Files are mapped into memory and not copied, except torch's old format, which is no zip archive and cannot be mapped.

    Raises:
        ConfigError: the file cannot be read as tensors only. Reading never runs code from the file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file fails in many ways
        raise ConfigError(f"{where}: {str(path)!r} must be a checkpoint of tensors: {type(error).__name__}: {error}") from error
    for entry in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{where}: {str(path)!r} must map names to tensors; got {type(content).__name__}")
    return dict(content)


def parted(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the tensors of a checkpoint: those whose names begin with a prefix, without it, and the others."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inside, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def fill(network: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors into a network. There must be a tensor for every parameter, and no others.

    Raises:
        ConfigError: a name is missing or left over, or a shape differs.
    """
    wanted = dict(network.state_dict())
    for name in sorted(wanted.keys() ^ tensors.keys()):
        state = "lacks" if name in wanted else "has an unknown"
        raise ConfigError(f"{where} {state} {name!r}; it is a checkpoint of another network")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ConfigError(f"{where}: {name!r} must have shape {tuple(wanted[name].shape)}; got {tuple(tensor.shape)}")
    network.load_state_dict(tensors, assign=True)


def assembled(
    full: Callable[[], torch.nn.Module], shallow: Callable[[], torch.nn.Module], tensors: Mapping[str, Tensor], where: str
) -> torch.nn.Module:
    """Build a network around the tensors of a checkpoint; there is no memory for weights that would be replaced.

    Args:
        full: makes the network
        shallow: makes it without layers: its buffers, which are no part of a checkpoint, are those of the network
        tensors: a tensor for every parameter
        where: for messages

    Raises:
        ConfigError: names or shapes do not fit.
    """
    with torch.device("meta"):
        network = full()
    fill(network, tensors, where)
    for name, buffer in shallow().named_buffers():
        owner, _, last = name.rpartition(".")
        network.get_submodule(owner).register_buffer(last, buffer, persistent=False)
    return network


def layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Count the layers whose tensors are called `prefix`0, `prefix`1, ..."""
    return 1 + max((int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix)), default=-1)
