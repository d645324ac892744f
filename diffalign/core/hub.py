"""Reach of the model hub, asked once a process: without a network nothing is tried again and again."""

import functools
import os
import socket
import urllib.request
from urllib.parse import urlsplit

_PATIENCE = 5.0
"""Seconds after which a network that does not answer counts as none."""

_ON = {"1", "ON", "YES", "TRUE"}


@functools.cache
def is_within_reach() -> bool:
    """Ask whether the hub, or the proxy on the way to it, accepts a connection. False also where HF_HUB_OFFLINE is set.

    Loaders that get `local_files_only=not is_within_reach()` look into the cache alone, instead of trying six times for each file.
    """
    if any(os.environ.get(name, "").upper() in _ON for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return False
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    proxies = urllib.request.getproxies()
    place = urlsplit(proxies.get(urlsplit(hub).scheme) or proxies.get("all") or hub)
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname or "", port), _PATIENCE).close()
    except (OSError, UnicodeError):  # the latter for a name that is no host's
        return False
    return True


def unreached(source: str, error: BaseException) -> str:
    """Say in plain words why a folder or hub id could not be loaded.

    Args:
        source: folder or hub id
        error: error of the loader
    """
    if not is_within_reach() and not os.path.exists(source):
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "there is no network"
        return f"it is no folder here, it is not in the cache, and {offline}"
    return str(error).strip().partition("\n")[0]
