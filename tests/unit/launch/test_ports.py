from __future__ import annotations

import socket

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.launch.ports import check_port, free_port, is_port_free


def test_a_port_in_use_is_named_with_another_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert not is_port_free("127.0.0.1", port)
        with pytest.raises(ConfigurationError, match=rf"port {port} on 127\.0\.0\.1 is in use.*--port \d+"):
            check_port("127.0.0.1", port)


def test_a_free_port_is_fine():
    check_port("127.0.0.1", free_port("127.0.0.1"))


def test_an_address_of_another_machine():
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        check_port("192.0.2.1", 8000)
