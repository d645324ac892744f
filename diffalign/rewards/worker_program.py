"""Program of a `WorkerReward`'s process. The interpreter runs this file only and need not have the package.

It needs Python 3.8 and torch. Messages on the pipe have the same form in both directions: 8 bytes with the length of a JSON text
(little-endian), the text, and for images their float32 numbers. Nothing is unpickled. The pipe is a private copy of stdin and stdout,
so that a reward may print.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import struct
import sys
import traceback
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")


class WorkerPrompt(str):
    """Prompt with its metadata and the source that it comes from, for an interpreter without the package's own class."""

    metadata: dict[str, Any]
    source: str | None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels from the metadata "height" and "width"; None if the metadata have neither.

        Raises:
            ValueError: only one of them is given, or they are not whole numbers above 0.
        """
        height, width = self.metadata.get("height"), self.metadata.get("width")
        if height is None and width is None:
            return None
        if type(height) is not int or type(width) is not int or height < 1 or width < 1:
            raise ValueError(
                f"a prompt's height and width must both be whole numbers of pixels; {str(self)!r} has {height!r} and {width!r}"
            )
        return height, width


def read_exactly(stream: BinaryIO, count: int) -> bytearray:
    """Read `count` bytes.

    Raises:
        EOFError: the other end has closed the pipe.
    """
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = stream.readinto(view[done : done + 2**20])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the pipe is closed")
        done += got
    return data


def write_frame(stream: BinaryIO, message: dict[str, Any], *payloads: Any) -> None:
    """Write a JSON text and the numbers that follow it."""
    text = json.dumps(message).encode("ascii")
    for piece in (LENGTH.pack(len(text)), text, *payloads):
        view = memoryview(piece).cast("B")
        while len(view):
            view = view[stream.write(view) :]
    stream.flush()


def read_frame(stream: BinaryIO, longest: int) -> Any:
    """Read a JSON text.

    Raises:
        EOFError: the pipe is closed.
        ValueError: the text is longer than `longest` bytes, or is not JSON.
    """
    (length,) = LENGTH.unpack(read_exactly(stream, LENGTH.size))
    if length > longest:
        raise ValueError(f"a message announces {length} bytes; at most {longest} are expected")
    return json.loads(read_exactly(stream, length).decode("utf-8"))


def main() -> None:
    """Build the reward, then score until the pipe closes."""
    questions, answers = _private_pipe()
    here = os.path.dirname(os.path.abspath(__file__))  # modules of this folder would hide others of the same name
    sys.path[:] = [os.getcwd(), *(entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here)]
    name, arguments, device = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    try:
        reward = _reward(name, arguments)
        importlib.import_module("torch")  # imported now, so that a missing torch is reported at the start
    except BaseException as error:
        write_frame(answers, _failure(error))
        raise
    write_frame(answers, {"ready": True})
    while True:
        try:
            question = read_frame(questions, 2**32)
            shape = question["shape"]
            pixels = read_exactly(questions, 4 * shape[0] * shape[1] * shape[2] * shape[3])
        except EOFError:
            return
        try:
            answer = {"scores": _scores(reward, pixels, shape, question["prompts"], device)}
        except Exception as error:
            traceback.print_exc()
            answer = _failure(error)
        write_frame(answers, {**answer, "id": question["id"]})


def _private_pipe() -> tuple[BinaryIO, BinaryIO]:
    questions, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    if hasattr(os, "register_at_fork"):  # children of the reward must not keep the pipe open after a crash
        os.register_at_fork(after_in_child=functools.partial(_close, questions, answers))
    return questions, answers


def _close(*streams: BinaryIO) -> None:
    for stream in streams:
        os.close(stream.fileno())


def _reward(name: str, arguments: dict[str, Any]) -> Any:
    module, _, path = name.partition(":")
    target: Any = importlib.import_module(module)
    for attribute in path.split("."):
        target = getattr(target, attribute)
    kind = target if isinstance(target, type) else type(target)
    if hasattr(kind, "of_groups"):  # pictures come in pieces, and a group may be cut
        raise TypeError(f"{name} scores all pictures of a prompt together, which a worker cannot: put it around the WorkerReward")
    if hasattr(kind, "of_step"):
        raise TypeError(f"{name} must be told the step of a run, which a worker is not: name it among the rewards of the run")
    if not isinstance(target, type) and arguments:
        raise TypeError(f"{name} is no class, so it takes no arguments; got {', '.join(arguments)}")
    if not callable(target):
        raise TypeError(f"{name} must be a class or a function of (images, prompts); it is a {type(target).__name__}")
    reward = target(**arguments) if isinstance(target, type) else target
    nesting = sys.modules.get("diffalign.core.nesting")  # only a reward of the package can hold another one of its kinds inside
    if nesting is not None:
        nesting.require_single(name, reward, "Put that around the WorkerReward, or name it among the rewards of the run.")
    return reward


def _scores(reward: Any, pixels: bytearray, shape: list[int], prompts: list[dict[str, Any]], device: str) -> list[float | None]:
    import torch

    images = torch.frombuffer(pixels, dtype=torch.float32).view(shape).to(device)
    with torch.no_grad():
        result = reward(images, [_prompt(entry) for entry in prompts])
    if not hasattr(result, "applies"):
        return [float(value) for value in _listed(result)]
    values, applies = _listed(result.values), _listed(result.applies)  # of the package's `Partial`, or of what stands for it here
    if len(values) != len(applies):
        raise ValueError(f"values and applies must be equally many; got {len(values)} and {len(applies)}")
    return [float(values[place]) if there else None for place, there in enumerate(applies)]


def _listed(numbers: Any) -> list[Any]:
    return numbers.tolist() if hasattr(numbers, "tolist") else list(numbers)


def _prompt(entry: dict[str, Any]) -> Any:
    core = sys.modules.get("diffalign.core.types")  # only a reward of the package needs its class, and has imported it
    if core is not None:
        return core.Prompt(*(entry[key] for key in ("text", "metadata", "source") if key in entry))
    prompt = WorkerPrompt(entry["text"])
    prompt.metadata, prompt.source = entry["metadata"], entry.get("source")
    return prompt


def _failure(error: BaseException) -> dict[str, Any]:
    words = str(error).lower()
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    full = full or (isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words))
    return {"error": f"{type(error).__name__}: {error}", "memory": full}


if __name__ == "__main__":
    main()
