"""Addresses that a server is shown under."""

import socket

import pytest

from diffalign.core import ConfigError
from diffalign.serving.launch import address_of, listen


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_listens_everywhere_is_shown_under_an_address_that_leads_there(host):
    try:
        listening = listen(host, 0)
    except ConfigError:
        pytest.skip("this machine has no such addresses")
    with listening:
        address, _, port = address_of(listening, host).removeprefix("http://").rpartition(":")
        assert address not in (host, f"[{host}]")  # which leads nowhere from another machine
        socket.create_connection((address.removeprefix("[").removesuffix("]"), int(port)), timeout=5).close()


def test_who_listens_on_one_address_is_shown_under_it():
    with listen("127.0.0.1", 0) as listening:
        assert address_of(listening, "127.0.0.1") == f"http://127.0.0.1:{listening.getsockname()[1]}"
