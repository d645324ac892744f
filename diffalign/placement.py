"""Where a network runs: the name of a device, judged before anything is loaded."""

import torch


def placed(device: str) -> torch.device:
    """The device that a name means.

    Args:
        device: "cpu", "cuda", "cuda:1", ..., or "auto", which is CUDA where there is one

    Raises:
        ValueError: no device, or none that torch finds on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:  # of a device that it was not built for torch asserts
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device must be one that torch finds on this machine ({_found()}) or auto; got {device!r}: {reason}") from error
    return place


def is_there(instance: object, attribute: object, device: str | None) -> None:
    """For a field of attrs: None, or as `placed` takes it."""
    if device is not None:
        placed(device)


def _found() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    return ", ".join(["cpu", *(f"{kind}:{place}" for place in range(torch.accelerator.device_count()))])
