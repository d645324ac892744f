"""Devices by name, checked before anything is loaded."""

import torch


def placed(device: str) -> torch.device:
    """Find the device of a name.

    Args:
        device: "cpu", "cuda", "cuda:1", ..., or "auto", which takes CUDA if there is one

    Raises:
        ValueError: the name is no device, or torch does not find it on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises AssertionError for a device that it was not built for
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device must be one that torch finds on this machine ({_found()}) or auto; got {device!r}: {reason}") from error
    return place


def taken(device: str) -> torch.device:
    """Find the device of a policy by its name, and make it the current one: its memory is counted, calls on it are recorded.

    Raises:
        ValueError: as `placed`.
    """
    place, kind = placed(device), torch.accelerator.current_accelerator()
    if kind is not None and place.type == kind.type and place.index is not None:
        torch.accelerator.set_device_index(place.index)
    return place


def is_there(instance: object, attribute: object, device: str | None) -> None:
    """Check a field of an attrs class: None, or a name that `placed` accepts."""
    if device is not None:
        placed(device)


def _found() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    return ", ".join(["cpu", *(f"{kind}:{place}" for place in range(torch.accelerator.device_count()))])
