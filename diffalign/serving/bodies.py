"""Requests with a JSON body: token, type, announced length, and the time in which the body must arrive."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request


def bearer(request: Request) -> str | None:
    """Bearer token of a request; None if it has none."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else None


def require_json(request: Request) -> None:
    """Refuse a body of another type, with 415. A foreign web page cannot send this type without permission."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")


def announced(request: Request, allowed: int) -> int:
    """Bytes that the body will have. Refuses a length that is not announced, with 411, or above `allowed`, with 413."""
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise HTTPException(411, "the length of the body must be announced by Content-Length")
    if len(length) > 18 or int(length) > allowed:
        raise HTTPException(413, f"a body must have at most {allowed} bytes; this one has {length[:20]}")
    return int(length)


async def received(request: Request, seconds: float) -> bytes:
    """Body of a request. Refuses one that has not arrived within some seconds, with 408, or never does, with 400."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
    except TimeoutError as error:
        raise HTTPException(408, f"the body must arrive within {seconds:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection was closed before the body was complete") from error
    return bytes(body)
