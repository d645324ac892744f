"""Limit on the memory and the requests of the server."""

from collections.abc import Iterator
from contextlib import contextmanager

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
