"""Protocol between `RemoteReward` and the reward server: JSON with PNG images as base64. docs/reward_server.md describes it.

Both ends share this module, so that they always agree. Images are sent as 8-bit RGB, as in an image file: the server scores
`round(255 * image) / 255`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from diffalign.core import ConfigError, Partial, Prompt

from .png import decode_png, encode_png, png_size

T = TypeVar("T")

VERSION, EXTENDED = 1, 2
"""Versions of the protocol. A message of another version is refused.

A message is of version 2 if it says what version 1 cannot: the source of a prompt, or that an image has no score. Every other one is of
version 1. So an older end reads all that it understands, and refuses what it would otherwise lose.
"""

SCORE, HEALTH, ABOUT = (f"/v{VERSION}/{name}" for name in ("score", "health", "version"))
"""Paths of the server."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WireError(ValueError):
    """Error for a message that does not follow the protocol."""


@attrs.frozen
class Limits:
    """Limits of one request.

    Args:
        body: bytes of the body
        images: number of images
        pixels: height x width, summed over the images
        text: characters of one prompt
    """

    body: int = attrs.field(default=64 * 2**20, validator=attrs.validators.ge(1))
    images: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    pixels: int = attrs.field(default=2**25, validator=attrs.validators.ge(1))
    text: int = attrs.field(default=20_000, validator=attrs.validators.ge(1))


@attrs.frozen(eq=False)
class ScoreRequest:
    """Request to score images.

    Args:
        id: chosen by the client; the answer repeats it
        images: [K, 3, H, W] uint8
        prompts: K prompts
    """

    id: str
    images: Tensor  # [K, 3, H, W]
    prompts: tuple[Prompt, ...]  # K


def pixels_of(images: Tensor) -> Tensor:
    """Convert images [K, 3, H, W] in [0, 1] to 8-bit pixels.

    Raises:
        WireError: the shape is wrong, or a number is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise WireError(f"images must have shape [K, 3, H, W]; got {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        raise WireError("images must be finite; some pixels are NaN or infinite")
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def encode_request(request: ScoreRequest) -> bytes:
    """Encode the body of a request.

    Raises:
        WireError: metadata that JSON cannot hold.
    """
    prompts = [plain_prompt(prompt) for prompt in request.prompts]
    return _dump(
        {
            "version": EXTENDED if any("source" in prompt for prompt in prompts) else VERSION,
            "id": request.id,
            "prompts": prompts,
            "images": [encode_png(image) for image in request.images],
        }
    )


@attrs.frozen(eq=False)
class PackedRequest:
    """Request that was read and checked, with images that are not decoded yet.

    Args:
        id: id of the request
        pictures: K PNG files as base64, all of one size by their headers
        prompts: K prompts
        pixels: height x width, summed over the images
    """

    id: str
    pictures: tuple[str, ...]  # K
    prompts: tuple[Prompt, ...]  # K
    pixels: int

    def unpack(self) -> ScoreRequest:
        """Decode the images of the request.

        Raises:
            WireError: an image is damaged.
        """
        images = [_at(place, decode_png, picture) for place, picture in enumerate(self.pictures)]
        return ScoreRequest(self.id, torch.stack(images), self.prompts)


def read_request(body: bytes, limits: Limits) -> PackedRequest:
    """Read a request from its body. Sizes are checked before anything is decoded.

    Raises:
        WireError: it does not follow the protocol, or is larger than the limits allow.
    """
    message = _message(body, {"version", "id", "prompts", "images"})
    identity, prompts, images = message["id"], message["prompts"], message["images"]
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        raise WireError("id must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -")
    if not isinstance(images, list) or not 1 <= len(images) <= limits.images:
        raise WireError(f"images must be a list of 1 to {limits.images} images{_count(images)}")
    if not isinstance(prompts, list) or len(prompts) != len(images):
        raise WireError(f"prompts must be a list of {len(images)}, one per image{_count(prompts)}")
    optional = {"source"} if message["version"] == EXTENDED else set()
    texts = tuple(_prompt(entry, place, limits.text, optional) for place, entry in enumerate(prompts))
    sizes = [_at(place, png_size, image) for place, image in enumerate(images)]
    if other := [place for place, size in enumerate(sizes) if size != sizes[0]]:
        raise WireError(f"images of one request must have one size; images[0] is {sizes[0]}, images[{other[0]}] is {sizes[other[0]]}")
    pixels = sizes[0][0] * sizes[0][1] * len(images)
    if pixels > limits.pixels:
        raise WireError(f"images must have at most {limits.pixels} pixels together; got {pixels}")
    return PackedRequest(identity, tuple(images), texts, pixels)


def encode_scores(identity: str, scores: Sequence[float | None]) -> bytes:
    """Encode the body of an answer with scores; None where an image has none."""
    return _dump({"version": EXTENDED if None in scores else VERSION, "id": identity, "scores": list(scores)})


def decode_scores(body: bytes, identity: str, count: int) -> list[float | None]:
    """Read the scores of an answer; None where the reward does not apply to an image.

    Raises:
        WireError: the answer belongs to another request, has another number of scores, or holds a score that is not a finite number.
    """
    message = _message(body, {"version", "id", "scores"})
    if message["id"] != identity:
        raise WireError(f"the answer belongs to another request: its id is {_short(message['id'])}, but the request has {identity!r}")
    scores = message["scores"]
    if not isinstance(scores, list) or len(scores) != count:
        raise WireError(f"the answer must hold {count} scores, one per image{_count(scores)}")
    for place, score in enumerate(scores):
        if score is None and message["version"] == EXTENDED:
            continue
        if isinstance(score, bool) or not isinstance(score, int | float) or not _finite(score):
            raise WireError(f"the score of image {place} of {count} must be a finite number; got {_short(score)}")
    return [None if score is None else float(score) for score in scores]


def plain_scores(scores: Tensor | Partial) -> list[float | None]:
    """Convert the scores of a reward [K] to plain JSON values: None where it does not apply to an image."""
    if isinstance(scores, Tensor):
        return [*scores.tolist()]
    told = zip(scores.values.tolist(), scores.applies.tolist(), strict=True)
    return [value if applies else None for value, applies in told]


def reward_of(scores: Sequence[float | None], device: torch.device) -> Tensor | Partial:
    """Convert plain scores to what a reward returns: a tensor [K], or a `Partial` where some are None."""
    values = torch.tensor([0.0 if score is None else score for score in scores], dtype=torch.float32, device=device)
    if None not in scores:
        return values
    return Partial(values, torch.tensor([score is not None for score in scores], dtype=torch.bool, device=device))


def encode_error(kind: str, text: str) -> bytes:
    """Encode the body of a refusal."""
    return _dump({"version": VERSION, "error": {"kind": kind, "message": text}})


def error_text(body: bytes) -> str:
    """Message of a refusal; the start of the body if it does not follow the protocol."""
    try:
        error = json.loads(body)["error"]
        return f"{error['message']}"
    except (ValueError, TypeError, LookupError, RecursionError):
        return _short(body.decode("utf-8", "replace"))


def _dump(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")


def _message(body: bytes, keys: set[str]) -> dict[str, Any]:
    try:
        message = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the message is not JSON: {_short(str(error))}; it begins {_short(body[:40])}") from error
    if not isinstance(message, dict):
        raise WireError(f"the message must be an object; got {type(message).__name__}")
    version = message.get("version")
    if version not in (VERSION, EXTENDED) or isinstance(version, bool):
        raise WireError(f"version must be {VERSION} or {EXTENDED}; got {_short(version)}. Both ends need the same protocol.")
    if message.keys() != keys:
        raise WireError(f"the message must have the keys {', '.join(sorted(keys))}; got {_short(sorted(message))}")
    return message


def plain_prompt(prompt: str) -> dict[str, Any]:
    """Convert a prompt to plain JSON values: its text and metadata, and its source if it has one. The size follows from the metadata.

    Raises:
        WireError: metadata that JSON cannot hold.
    """
    metadata = getattr(prompt, "metadata", {})
    for key, value in metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise WireError(f"metadata {key!r} of prompt {_short(str(prompt))} cannot be sent as JSON: {error}") from error
    source = Prompt.of(prompt).source
    return {"text": str(prompt), "metadata": dict(metadata), **({} if source is None else {"source": source})}


def require_portable(prompts: Sequence[Prompt], reward: str) -> None:
    """Refuse prompts whose metadata cannot be sent. The reward at the other end checks its own needs when it is called.

    Args:
        prompts: prompts of the run
        reward: class that would send them, for the message

    Raises:
        ConfigError: the metadata of a prompt cannot be sent; the message names the first such prompt and the reason.
    """
    for prompt in prompts:
        try:
            plain_prompt(prompt)
        except WireError as error:
            raise ConfigError(f"{reward}: {error}") from error


def _prompt(entry: Any, place: int, longest: int, optional: Set[str]) -> Prompt:
    if not isinstance(entry, dict) or entry.keys() - optional != {"text", "metadata"}:
        more = ", and source if it has one" if optional else ""
        raise WireError(f"prompts[{place}] must be an object with text and metadata{more}; got {_short(entry)}")
    text, metadata, source = entry["text"], entry["metadata"], entry.get("source")
    if not isinstance(text, str) or len(text) > longest:
        raise WireError(f"prompts[{place}].text must be at most {longest} characters; got {_short(text)}")
    if not isinstance(metadata, dict):
        raise WireError(f"prompts[{place}].metadata must be an object; got {_short(metadata)}")
    if source is not None and (not isinstance(source, str) or len(source) > longest):
        raise WireError(f"prompts[{place}].source must be null or at most {longest} characters; got {_short(source)}")
    try:  # JSON texts may hold half of a surrogate pair, NaN or infinity
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise WireError(f"prompts[{place}] must be Unicode text and finite numbers: {error}") from error
    return Prompt(text, metadata, source)


def _at(place: int, read: Callable[[Any], T], picture: Any) -> T:
    try:
        return read(picture)
    except ValueError as error:
        raise WireError(f"images[{place}] {error}") from error


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _count(value: Any) -> str:
    return f"; got {len(value)}" if isinstance(value, list) else f"; got {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
