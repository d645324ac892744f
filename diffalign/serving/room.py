"""Limit on the memory and the requests of the server."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs


class FullError(Exception):
    """The server has no room for another request now."""


@attrs.define(eq=False)
class Room:
    """Budget of bytes and requests, shared by all requests that are handled, so that the server's memory is limited.

    Args:
        bytes: bytes of bodies and pixels together
        requests: number of requests between arrival and answer
    """

    bytes: int = attrs.field(validator=attrs.validators.ge(1))
    requests: int = attrs.field(validator=attrs.validators.ge(1))
    _bytes_taken: int = attrs.field(default=0, init=False)
    _requests_taken: int = attrs.field(default=0, init=False)
    _outside: asyncio.Lock = attrs.field(factory=asyncio.Lock, init=False, repr=False)
    _inside: asyncio.Lock = attrs.field(factory=asyncio.Lock, init=False, repr=False)
    _freed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False, repr=False)

    @property
    def taken(self) -> tuple[int, int]:
        """Bytes and requests that are taken now."""
        return self._bytes_taken, self._requests_taken

    @contextmanager
    def seat(self) -> Iterator[None]:
        """Take room for one request while the context is open.

        Raises:
            FullError: there is none.
        """
        if self._requests_taken >= self.requests:
            raise FullError(f"{self._requests_taken} requests are being handled; come back later")
        self._requests_taken += 1
        try:
            yield
        finally:
            self._requests_taken -= 1

    async def until(self, size: int, seconds: float) -> None:
        """Wait until bytes are free for a request that has none yet, in the order of arrival. `hold` them before anything is awaited.

        Args:
            size: number of bytes
            seconds: after which it waits no longer; `hold` then refuses
        """
        await self._until(size, seconds, self._outside)

    async def until_more(self, size: int, seconds: float) -> None:
        """The same for a request that holds some bytes and needs others: before all that have none, or they would wait for each other."""
        await self._until(size, seconds, self._inside)

    async def _until(self, size: int, seconds: float, line: asyncio.Lock) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), line:
                while self._bytes_taken + size > self.bytes or (line is self._outside and self._inside.locked()):
                    self._freed.clear()
                    await self._freed.wait()
        self._freed.set()  # the next in line looks

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Take room for bytes while the context is open.

        Raises:
            FullError: there is none.
        """
        if self._bytes_taken + size > self.bytes:
            raise FullError(f"{self._bytes_taken} bytes of {self.bytes} are taken; come back later")
        self._bytes_taken += size
        try:
            yield
        finally:
            self._bytes_taken -= size
            self._freed.set()
