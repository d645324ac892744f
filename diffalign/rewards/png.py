"""Images as base64 text of 8-bit RGB PNG files. Their size is known before they are decoded."""

import base64
import io
import struct
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

_HEADER = struct.Struct(">8sI4sIIBB")
_SIGNATURE, _FIRST_CHUNK, _EIGHT_BITS, _RGB = b"\x89PNG\r\n\x1a\n", b"IHDR", 8, 2
_HEADER_TEXT = 4 * (-(-_HEADER.size // 3))


def encode_png(image: Tensor) -> str:
    """Encode an image [3, H, W] uint8 as the base64 text of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG", compress_level=1)  # six times as fast as level 6
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def png_size(text: Any) -> tuple[int, int]:
    """Read width and height from the header.

    Raises:
        ValueError: the text is not the base64 of an 8-bit RGB PNG. The message is meant to follow the name of the image.
    """
    if not isinstance(text, str):
        raise ValueError(f"must be the base64 text of a PNG file; got {type(text).__name__}")
    start = _unpacked(text[:_HEADER_TEXT])
    if len(start) < _HEADER.size:
        raise ValueError("must be a PNG file; it is shorter than its header")
    signature, _, chunk, width, height, depth, colour = _HEADER.unpack_from(start)
    if signature != _SIGNATURE or chunk != _FIRST_CHUNK:
        raise ValueError("must be a PNG file; it begins with something else")
    if (depth, colour) != (_EIGHT_BITS, _RGB):
        raise ValueError(f"must be 8-bit RGB without alpha; it has bit depth {depth} and PNG colour type {colour} (RGB is 2)")
    if width == 0 or height == 0:
        raise ValueError(f"must have pixels; it is {width} x {height}")
    return width, height


def decode_png(text: str) -> Tensor:
    """Decode the base64 text of a PNG file: [3, H, W] uint8.

    Raises:
        ValueError: the file is damaged. The message is meant to follow the name of the image.
    """
    size, data = png_size(text), _unpacked(text)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            pixels = numpy.array(picture)
    except Exception as error:  # Pillow's decoders raise many types: OSError, SyntaxError, zlib.error, struct.error, ...
        raise ValueError(f"is a damaged PNG file: {type(error).__name__}: {error}") from error
    if pixels.dtype != numpy.uint8 or pixels.shape != (size[1], size[0], 3):
        raise ValueError(f"is a damaged PNG file: its header promises {size[0]} x {size[1]} RGB pixels, it holds {pixels.shape}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"must be base64 text: {error}") from error
