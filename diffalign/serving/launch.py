"""Launch of the server: runs the application on a socket until it is told to end."""

import ipaddress
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from ..core import ConfigError

_HEADERS, _CONNECTIONS, _IDLE, _FAREWELL = 2**14, 1024, 75, 10

_EVERYWHERE = {"0.0.0.0": (socket.AF_INET, "192.0.2.1", "127.0.0.1"), "::": (socket.AF_INET6, "2001:db8::1", "::1")}
"""Hosts that stand for all addresses of this machine: kind, an address of documents, which is elsewhere, and that within this machine."""


def is_loopback(host: str) -> bool:
    """True if an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_address(name: str) -> bool:
    """True if a name is an address itself, which nobody can make lead elsewhere."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def configured(app: Starlette) -> uvicorn.Config:
    """Settings of uvicorn for an application: limits on headers and connections, and no log of requests."""
    return uvicorn.Config(
        app,
        http="h11",  # the same parser on every machine, with a limit on headers
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADERS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_FAREWELL,
    )


def address_of(listening: socket.socket, host: str) -> str:
    """Address of a listening socket, for a browser. Who listens on all addresses ("0.0.0.0") is named by that of this machine."""
    name = _own_address(host) if host in _EVERYWHERE else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{listening.getsockname()[1]}"


def _own_address(host: str) -> str:
    """Address that this machine has in its network; the one within it where there is no network."""
    family, elsewhere, within = _EVERYWHERE[host]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere, 9))  # sends nothing: it chooses the address that would send
        except OSError:
            return within
        return str(probe.getsockname()[0])


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. It states its protocol: without it, asyncio keeps Nagle's algorithm on, which costs 40 ms per answer.

    Raises:
        ConfigError: the address or the port cannot be used.
    """
    where = f"cannot listen on {host} port {port}"
    if not 0 <= port < 2**16:
        raise ConfigError(f"{where}: a port must be a number from 0 to 65535")
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise ConfigError(f"{where}: {error}") from error
    return listening


def serve(app: Starlette, host: str, port: int, ready: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM. Requests that have begun get ten seconds to finish.

    Args:
        app: the application
        host: address to listen on
        port: port of the address; 0 takes any free port
        ready: called with the address when connections are accepted

    Raises:
        ConfigError: the address or the port cannot be used.
    """
    listening = listen(host, port)
    with listening:
        ready(address_of(listening, host))
        uvicorn.Server(configured(app)).run(sockets=[listening])
