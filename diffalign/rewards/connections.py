"""HTTP connections that stay open between requests, with one deadline for the whole exchange. Standard library only."""

import http.client
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from urllib.parse import urlsplit

import attrs

_LOST = (http.client.RemoteDisconnected, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


class NoAnswerError(Exception):
    """No complete answer came: the connection was refused or cut off, or the answer was too late or too long."""


class _StaleError(Exception):
    """A kept connection was closed by the server in the meantime."""


@attrs.frozen
class Answer:
    """Complete HTTP answer.

    Args:
        status: HTTP status code
        headers: headers by lower-case name
        body: whole body
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


def _without_slash(url: str) -> str:
    return url.rstrip("/")


@attrs.define(eq=False)
class Connections:
    """Connections to one server, shared by threads. Redirects are not followed, so that the token goes to no other server.

    Args:
        url: http:// or https://, host, port and perhaps the beginning of the path
        timeout: seconds from the start of connecting to the last byte of the answer
        longest: largest number of bytes of an answer
    """

    url: str = attrs.field(converter=_without_slash)
    timeout: float
    longest: int
    _idle: list[http.client.HTTPConnection] = attrs.field(factory=list, init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            fits = False
        if not fits or parts.query or parts.fragment or parts.username or not self.url.isascii() or not self.url.isprintable():
            raise ValueError(f"url must be http://HOST:PORT or https://HOST, without user, query or fragment; got {self.url!r}")
        weakref.finalize(self, _close_all, self._idle)

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a request and wait for its answer. It may be sent twice, so it must change nothing on the server.

        Raises:
            NoAnswerError: no answer came; the message gives the reason.
        """
        deadline = time.monotonic() + self.timeout
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                return self._exchange(kept, path, body, headers, deadline, fresh=False)
            except _StaleError:
                pass
        return self._exchange(self._connection(), path, body, headers, deadline, fresh=True)

    def reach(self, seconds: float) -> None:
        """Check that a server listens, without sending anything.

        Args:
            seconds: to wait at most

        Raises:
            NoAnswerError: nobody does; the message says why.
        """
        try:
            socket.create_connection(self._address(), min(seconds, self.timeout)).close()
        except OSError as error:
            raise NoAnswerError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the connections that are open and idle."""
        with self._lock:
            _close_all(self._idle)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if urlsplit(self.url).scheme == "https" else http.client.HTTPConnection
        return kind(*self._address())

    def _address(self) -> tuple[str, int]:
        """Host and port. Without a port http.client would look for one in the host, and find the end of an IPv6 address."""
        parts = urlsplit(self.url)
        usual = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}[parts.scheme]
        return parts.hostname or "", parts.port or usual

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str], deadline: float, fresh: bool
    ) -> Answer:
        late = threading.Event()
        opened: list[socket.socket] = []  # where the answer ends the connection, http.client forgets the socket before it reads the body

        def cut() -> None:
            late.set()
            for each in opened:
                _shut(each)

        remaining = max(deadline - time.monotonic(), 0.001)
        watch = threading.Timer(remaining, cut)  # a socket's own timeout would start again with every byte that arrives
        watch.daemon = True
        connection.timeout = remaining
        if connection.sock is not None:
            connection.sock.settimeout(remaining)
        watch.start()
        try:
            if connection.sock is None:
                connection.connect()
            opened.append(connection.sock)
            if late.is_set():
                raise TimeoutError("connecting took all the time")
            answer, open_still = self._answer(connection, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if late.is_set() or isinstance(error, TimeoutError):
                raise NoAnswerError(f"no complete answer within {self.timeout:g} s") from error
            if not fresh and isinstance(error, _LOST):
                raise _StaleError from error
            raise NoAnswerError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            connection.close()
            raise
        finally:
            watch.cancel()
        if late.is_set():
            connection.close()
            raise NoAnswerError(f"no complete answer within {self.timeout:g} s")
        if open_still:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.close()
        return answer

    def _answer(self, connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[Answer, bool]:
        """Read the answer; also returns whether the connection can be used again."""
        connection.request("POST", urlsplit(self.url).path + path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        data = response.read(self.longest + 1)
        if len(data) > self.longest:
            raise http.client.HTTPException(f"the answer is longer than {self.longest} bytes")
        if response.length:  # read(n) itself raises no error for a short body
            raise http.client.IncompleteRead(data, response.length)
        closing = response.will_close
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, data), not closing


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _shut(connected: socket.socket) -> None:
    """Shut down a connection while another thread waits for it. The plain socket method is used, because TLS would first send a message."""
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:  # it is closed already
        return
